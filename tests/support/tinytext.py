"""A tokenizer of a few words, for tests of text."""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = "<pad> <s> </s> <unk> the cat dog sat on mat".split()


def words(*, specials: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of words, as models of transformers have one.

    Args:
        specials: documents begin and end with special tokens.
        options: of transformers.
    """
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if specials:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    known = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**known, **options})
