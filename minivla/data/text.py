"""A tokenizer for a small world, trained on its own sentences.

PaliGemma's has 257,152 tokens and a licence of its own. A table of blocks needs a few hundred: this one is a
byte pair encoding (Sennrich et al. 2016) of the same make, spaces written as "▁" and <bos> put in front, and
what it was trained on becomes one token a word and one token a number. Other words fall into pieces, down to
letters, so that a sentence nobody thought of can still be read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPACE = "▁"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
LETTERS = [SPACE, "\n", *map(chr, range(ord("!"), ord("~") + 1))]
# A word and a number take the space before them along; punctuation stands alone.
PIECES = f"{SPACE}?[A-Za-z]+|{SPACE}?-?[0-9]+|[^A-Za-z0-9]"


def train_tokenizer(
    sentences: Iterable[str],
    *,
    integers: Iterable[int] = range(-1, 256),
    reserved: int = 0,
    most: int = 4096,
) -> PreTrainedTokenizerFast:
    """A tokenizer that knows every word of `sentences`, and every one of `integers`, as one token.

    `reserved` tokens <extra_0>, <extra_1>, … are put behind the others, for what is not text, such as
    actions. `most` bounds the size before them. <pad> is token 0; <bos> begins whatever is encoded, as in
    PaliGemma. A sentence's first word is encoded as if a space came before.

    >>> tokenizer = train_tokenizer(["put the red cube on the blue pad"])
    >>> tokenizer.tokenize("Put the cube, 255\\n")
    ['▁', 'P', 'ut', '▁the', '▁cube', ',', '▁255', '\\n']
    >>> tokenizer("the pad").input_ids[0] == tokenizer.bos_token_id
    True
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = BpeTrainer(
        vocab_size=most,
        min_frequency=1,
        show_progress=False,
        special_tokens=list(SPECIAL),
        initial_alphabet=LETTERS,
    )
    core.train_from_iterator([*sorted(set(sentences)), " ".join(map(str, integers))], trainer)
    core.add_special_tokens([AddedToken(f"<extra_{i}>", special=True) for i in range(reserved)])
    core.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)
