"""From data sets to batches: sources, prompts, splits, tokens, packing, collation."""

from hycam.data.cache import RowCache, rows_digest
from hycam.data.collation import Collator
from hycam.data.config import NUM_FOLDS, PROMPT_STYLES, DataConfig, StreamingConfig, TaskConfig
from hycam.data.formats import KNOWN_SETS
from hycam.data.packing import pack_dataset
from hycam.data.prompts import prompt_text
from hycam.data.sampling import EpochSampler, mix_tasks
from hycam.data.sources import load_task
from hycam.data.splits import split_dataset
from hycam.data.streaming import StreamCollator, StreamedRows, read_held_out
from hycam.data.tokenization import IGNORED_LABEL, TokenizedTask, check_tokenizer, encode_prompt, tokenize_dataset

__all__ = [
    "IGNORED_LABEL",
    "KNOWN_SETS",
    "NUM_FOLDS",
    "PROMPT_STYLES",
    "Collator",
    "DataConfig",
    "EpochSampler",
    "RowCache",
    "StreamCollator",
    "StreamedRows",
    "StreamingConfig",
    "TaskConfig",
    "TokenizedTask",
    "check_tokenizer",
    "encode_prompt",
    "load_task",
    "mix_tasks",
    "pack_dataset",
    "prompt_text",
    "read_held_out",
    "rows_digest",
    "split_dataset",
    "tokenize_dataset",
]
