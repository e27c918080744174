"""The architectures of encoders. A new one is a module beside `bert.py`, a table of names, and an entry here."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import BertConfig, PreTrainedConfig

from bertlite.config.settings import Architecture
from bertlite.model.bert import build_bert
from bertlite.model.encoder import Encoder


@dataclass(frozen=True)
class EncoderArchitecture:
    """How to build an encoder, and how Hugging Face names its weights.

    In the tables our module is on the left and Hugging Face's on the right; `.weight` and `.bias` follow in both.
    Where there are several on the right, our tensor is theirs concatenated.
    """

    build: Callable[[Architecture, str, bool], Encoder]  # of config, attention kernel, and whether it has a pooler
    config: type[Architecture]
    hf_config: type[PreTrainedConfig]  # its defaults stand in for keys that config.json lacks
    class_prefix: str  # of transformers' classes
    weight_prefix: str  # of the encoder's weights under a head
    encoder: dict[str, list[str]]
    layer_prefix: str
    layer: dict[str, list[str]]
    heads: dict[str, dict[str, list[str]]]  # keys are the suffixes of transformers' classes
    tied: dict[str, str]  # weights that must equal others, and are not kept
    unused: re.Pattern[str]  # weights that a folder may hold and the model does not need
    required: dict[str, tuple[Any, ...]]  # keys of config.json that change the computation, and bertlite's values


BERT = EncoderArchitecture(
    build=build_bert,
    config=Architecture,
    hf_config=BertConfig,
    class_prefix="Bert",
    weight_prefix="bert.",
    encoder={
        "embeddings.word": ["embeddings.word_embeddings"],
        "embeddings.position": ["embeddings.position_embeddings"],
        "embeddings.segment": ["embeddings.token_type_embeddings"],
        "embeddings.norm": ["embeddings.LayerNorm"],
        "pooler.dense": ["pooler.dense"],
    },
    layer_prefix="encoder.layer.{number}.",
    layer={
        "attention.qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
        "attention.out": ["attention.output.dense"],
        "attention_norm": ["attention.output.LayerNorm"],
        "up": ["intermediate.dense"],
        "down": ["output.dense"],
        "norm": ["output.LayerNorm"],
    },
    heads={
        "Model": {},
        "ForMaskedLM": {
            "head": ["cls.predictions"],
            "head.dense": ["cls.predictions.transform.dense"],
            "head.norm": ["cls.predictions.transform.LayerNorm"],
        },
        "ForSequenceClassification": {"classifier": ["classifier"]},
        "ForTokenClassification": {"classifier": ["classifier"]},
        "ForQuestionAnswering": {"classifier": ["qa_outputs"]},
        "ForMultipleChoice": {"classifier": ["classifier"]},
    },
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    # position_ids count from 0, token_type_ids are 0; bertlite has no next-sentence prediction.
    unused=re.compile(
        r"cls\.seq_relationship\.|.*(position|token_type)_ids$|cls\.predictions\.decoder\.|bert\.pooler\."
    ),
    required={
        "position_embedding_type": (None, "absolute"),
        "is_decoder": (None, False),
        "add_cross_attention": (None, False),
        "problem_type": (None, "single_label_classification", "multi_label_classification", "regression"),
    },
)

# Keys are Hugging Face's model_type.
ARCHITECTURES = {"bert": BERT}


def build_encoder(config: Architecture, kernel: str = "sdpa", pooler: bool = False) -> Encoder:
    """Build the encoder that `config` describes, with random weights."""
    return ARCHITECTURES[config.model_type].build(config, kernel, pooler)
