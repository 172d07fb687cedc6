"""A model that reads prompts: its tokenizer and processor, and what they make of texts and images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .errors import InputsError
from .models.architecture import Architecture
from .models.checks import check_pictures
from .models.network import Network
from .models.sight import inputs_with_images
from .plan.encoded import after_source, start_of
from .plan.images import check_pixels
from .plan.inputs import Inputs
from .plan.labels import class_id, class_names
from .plan.prompts import bos_of, decode_ids, encode_text, one_token, prepare


class Reader(Network):
    """A model with what turns prompts into its inputs, and ids into text.

    Attributes:
        module: the user's model.
        tokenizer: what turns prompts into ids, or None.
        processor: what turns prompts and images into ids and pixels, or None.
    """

    def __init__(
        self, module: nn.Module, tokenizer: Any, adapter: Callable[[Any], Architecture], processor: Any = None
    ) -> None:
        super().__init__(module, adapter)
        self.tokenizer, self.processor = tokenizer, processor

    def inputs(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]] | Mapping[str, Any] | Tensor,
        mask: Tensor | None = None,
        *,
        images: Any = None,
        padding: str = "right",
        row_ids: Tensor | None = None,
        bos: bool | None = None,
        decoded: str | Sequence[str] | Sequence[Sequence[int]] | None = None,
    ) -> Inputs:
        """Prepare prompts, or images for a model that takes those.

        Args:
            prompts: a text or several, which the tokenizer encodes with the special tokens that it adds by itself;
                lists of token ids of any lengths; or a tensor of ids [B, T]. For a vision model pixels [B, C, height,
                width], as its image processor makes them; a run brings them into the model's dtype. For a model with
                a vision tower also what its processor makes of texts and images, as a dict of tensors.
            mask: [B, T], nonzero at real tokens, with a tensor of ids.
            images: for each text its image (PIL's, an array or a tensor), several in a list, or None, where the
                model was wrapped with its processor; texts hold the token that stands for an image.
            padding: the side on which ragged rows are padded, ``"right"`` or ``"left"``.
            row_ids: int [B], what random interventions know the rows by; default 0 .. B-1.
            bos: of texts: True for exactly one BOS, False for none but what the text has (that of a chat template has
                one); by default what the tokenizer does, with a warning where that makes two.
            decoded: what a model that decodes what it encodes has decoded so far, a text or a list of ids a row, which
                follow its start token; by default nothing. Positions are those of the decoder, 0 is the start token.

        Raises:
            InputsError: no prompt or an empty one, ids outside the vocabulary, text without a tokenizer, images of
                another size, images where the model takes prompts, or prompts where it takes images.
        """
        self.refresh()
        arch, vocabulary = self.architecture, self.architecture.token_ids
        if images is not None or (arch.tower is not None and isinstance(prompts, Mapping)):
            if mask is not None:
                raise InputsError("a mask goes with a tensor of ids; what a processor makes has its own")
            labels = None if self.tokenizer is None else self.decode
            return inputs_with_images(arch, self.processor, prompts, images, padding, row_ids, labels)
        if arch.images is not None:
            if mask is not None:
                raise InputsError("an image has no padding, so there is no mask to give")
            return Inputs.of_images(check_pixels(prompts, arch.images), arch.images.patch, row_ids, arch.images.prefix)
        if isinstance(prompts, Tensor) and prompts.is_floating_point() and prompts.ndim > 2:
            raise InputsError(
                f"{self!r} is a language model: it takes texts or token ids, not pixels {list(prompts.shape)}"
            )
        decode = None if self.tokenizer is None else self.decode
        made = prepare(
            prompts, mask, row_ids, padding, encode=partial(encode_text, self.tokenizer, bos=bos), decode=decode,
            vocabulary=vocabulary, bos_id=bos_of(self.tokenizer),
        )  # fmt: skip
        check_pictures(arch.tower, made)
        if arch.encoder is None:
            if decoded is not None:
                raise InputsError(f"{self!r} encodes nothing, so there is nothing that it decodes of it: give one text")
            return made
        return after_source(made, decoded, start_of(self.module), padding, self.tokenizer, vocabulary)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds by itself.

        Raises:
            InputsError: there is no tokenizer.
        """
        return encode_text(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, in which a piece that begins a word keeps its space; of a classifier, labels of classes.

        Raises:
            InputsError: there is no tokenizer.
        """
        if self.architecture.readout is not None:
            return class_names(self.module, ids)
        return decode_ids(self.tokenizer, ids)

    def token(self, text: str) -> int:
        """The id of a text that is one token, or of a classifier's label.

        Raises:
            InputsError: it is not; the message shows its pieces.
        """
        if self.architecture.readout is not None:
            return class_id(self.module, text)
        return one_token(self.tokenizer, text)
