"""Sentences scored by a masked language model: pseudo-perplexity, and minimal pairs."""

# Shapes: N sentences, C masked copies of sentences, B copies computed together, T positions, V vocabulary.
import math
from collections.abc import Iterable, Iterator
from itertools import batched
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bertlite.config import DataSettings
from bertlite.errors import UserError
from bertlite.inference import like_lengths, padded
from bertlite.model import MaskedLanguageModel
from bertlite.sources import read_documents, read_records, source_files

SENTENCES_AT_A_TIME = 1024
