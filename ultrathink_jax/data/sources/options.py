"""What sources are told beside their own argument."""

import dataclasses

from ultrathink_jax.data.code.options import CodeOptions
from ultrathink_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SourceOptions:
  """Settings that all sources share.

  Attributes:
    text_field: the field under which a plain text is found.
    max_record_bytes: longer lines and entries are rejected, unread where possible.
    vocab_size: of the model; the synthetic source keeps within it.
    code: what is made of source trees.
    tokenizer: that will read the documents, where it is known before they are read.
  """

  text_field: str = "text"
  max_record_bytes: int = 32 * 1024 * 1024
  vocab_size: int = 50_304
  code: CodeOptions = dataclasses.field(default_factory=CodeOptions)
  tokenizer: Tokenizer | None = None
