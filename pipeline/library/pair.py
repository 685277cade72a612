"""The two models of a notebook: their rows, their answers, and edits of their stream in the real modules.

Shapes: B documents, T positions, M models, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.analyses.attribution import attribute, logit_of, next_token_loss
from pipeline.analyses.logit_lens import FirstTokens, LogitLens
from pipeline.analyses.next_tokens import NextTokens, side_by_side
from pipeline.analyses.splicing import spliced
from pipeline.analyses.steering_inputs import directions_of
from pipeline.errors import InputError
from pipeline.extraction.activations import ExtractRows, RowOptions, kept_positions
from pipeline.extraction.quarantine import extract_with_quarantine
from pipeline.library.checks import model_index, require_own_latents, require_pair_fit
from pipeline.library.difference import Difference, measured_difference
from pipeline.library.origin import Origin, require_same_origin
from pipeline.library.rows import Rows
from pipeline.library.texts import DIALOGUES, TEXTS, Text, prompts_of, tokenised
from pipeline.models.generation import Sampling
from pipeline.models.live_edits import stream_hooked
from pipeline.models.padding import pad_tokens
from pipeline.models.pair import ModelPair
from pipeline.models.verification import require_plain_forward
from pipeline.numerics.crosscoder import Crosscoder
from pipeline.schema import BASE, CHAT
from pipeline.text.tokenise import Tokenise

if TYPE_CHECKING:
    import pandas as pd

ModelName = Literal["base", "chat"]
_NUM_CHECKED, _CHECKED_TOKENS = 3, 256
"""Documents that are compared with the library's own forward once, and tokens of each."""


class Pair:
    """A base and a chat model at one layer; `load_pair` makes one.

    `base` and `chat` are the transformers models themselves: within `steer` and `splice` your own calls of them see the
    edit too. With an adapter on one copy of the weights both are one module, which each access switches.
    """

    def __init__(self, models: ModelPair, options: RowOptions, tokenise: Tokenise, names: tuple[str, str]) -> None:
        """options: which tokens are rows. names: of base and chat, for messages."""
        self.models, self.options, self.tokenise = models, options, tokenise
        self.origin = Origin.of(models, names)
        """The pair and its layer, which rows and crosscoders carry."""
        self._is_verified = False

    def __repr__(self) -> str:
        base, chat = self.origin.base.name, self.origin.chat.name
        return f"Pair({base!r}, {chat!r}, layer={self.layer} of {self.models.num_layers}, device={str(self.device)!r})"

    @property
    def layer(self) -> int:
        """Counted from 0: the output of `model.layers[layer]`."""
        return self.models.layer

    @property
    def device(self) -> torch.device:
        """Where the chat model's inputs go, and a crosscoder must be."""
        device: torch.device = self.models.device
        return device

    @property
    def tokenizer(self) -> Any:
        """The chat model's tokenizer, which makes the ids that both models read."""
        return self.models.tokenizer

    @property
    def base(self) -> Any:
        """The base model."""
        self.models.decoders[BASE].select()
        return self.models.decoders[BASE].model

    @property
    def chat(self) -> Any:
        """The chat model."""
        self.models.decoders[CHAT].select()
        return self.models.decoders[CHAT].model

    def activations(self, texts: Sequence[Text]) -> Rows:
        """Rows of both models after the layer, in the order of the texts, one per token that counts as a row.

        Args:
            texts: strings (plain documents) or dialogues (lists of messages with role and content), mixed as you like.

        Raises InputError for an empty list, a text without tokens, and one that gives NaN or Inf.
        """
        documents = tokenised(self.tokenise, texts)
        if not self._is_verified:
            require_plain_forward(
                self.models,
                [ids[:_CHECKED_TOKENS].tolist() for ids in documents["input_ids"][:_NUM_CHECKED]],
                parts=("rows",),
            )
            self._is_verified = True
        extract = ExtractRows(self.models, self.options)
        rows = extract_with_quarantine(extract, documents, vocab_size=self.models.vocab_size, max_quarantined=0).rows
        is_dialogue = {
            doc_id: corpus == DIALOGUES for doc_id, corpus in zip(documents["doc_id"], documents["corpus"], strict=True)
        }
        corpora = tuple(dict.fromkeys(documents["corpus"]))
        corpus_B = torch.tensor(
            [corpora.index(DIALOGUES if is_dialogue[doc_id] else TEXTS) for doc_id in rows.doc_id_B.tolist()],
            dtype=torch.int32,
        )
        if len(rows.x_BMD) == 0:
            raise InputError("texts: expected tokens that become rows, got none; see drop_first_tokens of load_pair")
        dialogues = tuple(index for index, name in enumerate(corpora) if name == DIALOGUES)
        about = {"corpora": corpora, "origin": self.origin, "dialogue_corpora": dialogues}
        return Rows.of(rows, corpus_B, **about, tokenizer=self.tokenizer)

    def next_tokens(self, text: Text, *, num_top: int = 5) -> NextTokens:
        """What both models predict after every token of one text, and KL(p_chat || p_base) there, in nats.

        Args:
            text: a text or a dialogue; of one that gives a document per answer, the last document.
            num_top: likeliest tokens of each model.

        Both models run whole.
        """
        batch = pad_tokens(tokenised(self.tokenise, [text])["input_ids"][-1:])
        h_BTMD = self.models.activations(*batch)
        base_PD, chat_PD = (self.models.upper(model, h_BTMD[:, :, model], batch.mask_BT)[0] for model in (BASE, CHAT))
        return side_by_side(self.models, base_PD, chat_PD, num_top=num_top)

    def difference(self, texts: Sequence[Text]) -> Difference:
        """Whether the two models can be told apart on these texts, and how different they are.

        Give it to `crossray.latents`: where the models cannot be told apart, no latent is called new. Both models run
        whole.
        """
        return measured_difference(self.models, tokenised(self.tokenise, texts), self.options, self.origin)

    def generate(
        self,
        prompts: Sequence[Text],
        *,
        max_new_tokens: int = 64,
        model: ModelName = "chat",
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers of one model, one per prompt, in one batch; steered or spliced within such a block.

        Args:
            prompts: what a user says, or dialogues that end before an answer. Without a chat template, texts to go on.
            max_new_tokens: an answer that is not ended by then is cut.
            model: which of the two answers.
            temperature: 0 takes the likeliest token.
            seed: of what is drawn; a prompt's answer does not depend on the others.
        """
        ids = prompts_of(self.tokenizer, prompts)
        sampling = None
        if temperature > 0:
            drawn = [np.random.default_rng((seed, place)).random(max_new_tokens) for place in range(len(ids))]
            sampling = Sampling(temperature, torch.from_numpy(np.stack(drawn)))
        answers = self.models.generate(ids, max_new_tokens, model=model_index(model), sampling=sampling)
        return [str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]

    @contextmanager
    def steer(
        self,
        crosscoder: Crosscoder,
        latent: int,
        scale: float,
        *,
        latents: "pd.DataFrame | None" = None,
        model: ModelName = "chat",
    ) -> Iterator[None]:
        """Within the block a latent's chat direction is added to one model's stream, at every position.

        Args:
            crosscoder: of this pair and layer.
            latent: index of the latent.
            scale: how much. With `latents`, in largest activations of the latent, as the report counts; without, in the
                latent's own code: scale * d_j^chat is added.
            latents: the latent table (crossray.latents, or a run's), which knows the largest activations.
            model: which of the two models is steered.
        """
        index = model_index(model)
        require_pair_fit(crosscoder, self.models, self.origin)
        require_own_latents([latent], crosscoder)
        if latents is None:
            vector_D = crosscoder.raw_decoder_FMD()[latent, CHAT] * scale
        else:
            (direction,) = directions_of(crosscoder, latents, [latent])
            vector_D = direction.unit_D * (scale * direction.max_contribution)
        with stream_hooked(self.models.decoders[index], lambda h_BTD: h_BTD + vector_D.to(h_BTD)):
            yield

    @contextmanager
    def splice(
        self,
        crosscoder: Crosscoder,
        *,
        error: bool = False,
        without: Sequence[int] = (),
        model: ModelName = "chat",
    ) -> Iterator[None]:
        """Within the block one model reads the crosscoder's reconstruction in place of its stream after the layer.

        Positions that are no rows (padding, BOS, first tokens, attention sinks) are left alone.

        Args:
            crosscoder: of this pair and layer.
            error: adds what the reconstruction misses, so that nothing changes but for `without`.
            without: latents whose contribution is left out.
            model: which of the two models is edited; the other one runs beside it up to the layer.
        """
        index = model_index(model)
        require_pair_fit(crosscoder, self.models, self.origin)
        require_own_latents(without, crosscoder)
        with spliced(self.models, crosscoder, self.options, model=index, keeps_error=error, without=without):
            yield

    def logit_lens(self, crosscoder: Crosscoder, latents: Sequence[int], *, num_tokens: int = 10) -> "pd.DataFrame":
        """Tokens that latents promote and suppress: their decoder rows through each model's norm and unembedding.

        Args:
            crosscoder: of this pair and layer.
            latents: indices below num_latents.
            num_tokens: tokens named on each side.

        Returns:
            Three rows per latent (base, chat, and the chat model's logits less the base model's), columns of
            analyses.logit_lens_columns.LOGIT_LENS_COLUMNS.
        """
        require_pair_fit(crosscoder, self.models, self.origin)
        require_own_latents(latents, crosscoder)
        lens = LogitLens(self.models, self.tokenizer, num_tokens=num_tokens)
        return lens.latents(list(latents), crosscoder.raw_decoder_FMD()[list(latents)])

    def first_tokens(self, rows: Rows, *, num_positions: int = 5, num_tokens: int = 10) -> "pd.DataFrame":
        """Tokens that the mean difference of the first tokens' rows promotes: what shows without a dictionary.

        Args:
            rows: of this pair and layer; best of texts that have nothing to do with the fine-tuning.
            num_positions: leading positions of documents.
            num_tokens: tokens named on each side.

        Returns:
            One row per corpus and position, columns of analyses.logit_lens_columns.FIRST_TOKEN_COLUMNS.
        """
        require_same_origin(rows.origin, self.origin, what="rows", owner="the pair")
        lens = LogitLens(self.models, self.tokenizer, num_tokens=num_tokens)
        means = FirstTokens(corpora=rows.corpora, activation_dim=rows.activation_dim, num_positions=num_positions)
        sums = means.start()
        means.update(sums, rows.x, rows.data.position_B, rows.data.corpus_B)
        return means.table(sums, lens)

    def attribute(
        self,
        crosscoder: Crosscoder,
        texts: Sequence[Text],
        target: str | int | Callable[[Tensor, Tensor, Tensor], Tensor] = "loss",
        *,
        model: ModelName = "chat",
    ) -> "pd.DataFrame":
        """How much every latent at every position adds to a number, by one backward pass; largest first.

        attribution = activation * <gradient of the number, decoder row of the model>: to first order, by how much the
        number falls if the latent's contribution is taken out there.

        Args:
            crosscoder: of this pair and layer.
            texts: texts or dialogues; all run in one batch.
            target: "loss" (summed nats of the next tokens), a token id (its logit after the end of each text), or a
                function of (logits_BTV, ids_BT, mask_BT) that gives one number.
            model: whose number it is, and whose decoder rows are read.

        Returns:
            Columns document (index into texts), position, token_id, latent, activation, attribution.
        """
        index = model_index(model)
        require_pair_fit(crosscoder, self.models, self.origin)
        documents = tokenised(self.tokenise, texts)
        positions = [kept_positions(np.asarray(flags), self.options) for flags in documents["flags"]]
        batch = pad_tokens(documents["input_ids"])
        return attribute(self.models, crosscoder, batch, positions, self._target(target), model=index)

    def _target(self, target: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if callable(target):
            return target  # type: ignore[no-any-return]
        if target == "loss":
            return next_token_loss
        if isinstance(target, int) and 0 <= target < self.models.vocab_size:
            return logit_of(target)
        raise InputError(
            f"target: expected 'loss', a token id below {self.models.vocab_size} or a function of the logits, got "
            f"{target!r}"
        )
