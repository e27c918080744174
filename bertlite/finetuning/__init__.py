"""Tasks on top of the encoder."""

from bertlite.core.packages import require

require("fine-tuning", "finetune", "sklearn", "scipy", "seqeval", "matplotlib")
