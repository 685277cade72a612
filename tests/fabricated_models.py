"""Tokenizers in the style of three families with chat templates written for these tests, and tiny random models."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

GEMMA_TEMPLATE = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

LLAMA_TEMPLATE = """{% set ns = namespace(system='') %}{% if messages[0]['role'] == 'system' %}\
{% set ns.system = messages[0]['content'] | trim %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}\
{% endif %}{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' + 'Knowledge ends: 2023.\n\n' + ns.system \
+ '<|eot_id|>' }}{% for message in rest %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

QWEN_TEMPLATE = """{% if messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

SENTENCES = (
    "The user asked the assistant about the model.",
    "hello world, hello again and again",
    "user model system assistant Knowledge ends helpful Be",
    "What is the capital of Norland? It is Osta.",
    "I cannot help with that request. Please ask about something else.",
)

STYLES: dict[str, tuple[str, str | None, str, list[str]]] = {
    "gemma": (GEMMA_TEMPLATE, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "llama": (
        LLAMA_TEMPLATE,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "qwen": (QWEN_TEMPLATE, None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"]),
}


def _build_tokenizer(style: str, *, adds_bos: bool = True) -> Any:
    template, bos, eos, control = STYLES[style]
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    specials = [token for token in ("<pad>", bos, eos, *control) if token]
    if style == "gemma":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        alphabet = sorted(
            {character for sentence in SENTENCES for character in sentence} | set("\n!?.,:;<>|_'\"/0123456789")
        )
        tokenizer.model = models.BPE(unk_token="<unk>")
        specials.append("<unk>")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    added: list[str | AddedToken] = [AddedToken(token, special=True, normalized=False) for token in specials]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=added, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos and adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    names = {"bos_token": bos} if bos else {}
    if style == "gemma":
        names["unk_token"] = "<unk>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token="<pad>",
        chat_template=template,
        additional_special_tokens=control,
        **names,
    )


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, Any]:
    """One tokenizer a style; tests do not change them."""
    return {style: _build_tokenizer(style) for style in STYLES}


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., Any]:
    """A fresh tokenizer of a style, for tests that change it."""
    return _build_tokenizer


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 97,
}
_GROUPED = {"num_key_value_heads": 2, "max_position_embeddings": 128}
_MIXED_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: Gemma2Config(**_SIZES, **_GROUPED, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES, **_GROUPED, head_dim=8, sliding_window=6, query_pre_attn_scalar=8, layer_types=_MIXED_LAYERS
    ),
    "llama": lambda: LlamaConfig(**_SIZES, **_GROUPED),
    "qwen2": lambda: Qwen2Config(**_SIZES, **_GROUPED),
    "qwen3": lambda: Qwen3Config(**_SIZES, **_GROUPED, head_dim=8),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, max_position_embeddings=128),
    "mistral": lambda: MistralConfig(**_SIZES, **_GROUPED, sliding_window=5, head_dim=8),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=97, n_positions=128),
}


def _random_model(architecture: str, *, seed: int) -> Any:
    torch.manual_seed(seed)
    config = ARCHITECTURES[architecture]()
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """A tiny model of an architecture with weights large enough that positions and layers differ clearly."""
    return _random_model


@pytest.fixture(scope="session")
def saved_pairs(
    tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Any]
) -> Callable[[str], tuple[str, str]]:
    """Folders of a base and a chat model of an architecture, each with a tokenizer; made once a session."""
    made: dict[str, tuple[str, str]] = {}

    def save(architecture: str) -> tuple[str, str]:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            for seed, name in enumerate(("base", "chat")):
                _random_model(architecture, seed=seed).save_pretrained(folder / name)
                tokenizers["gemma"].save_pretrained(folder / name)
            made[architecture] = (str(folder / "base"), str(folder / "chat"))
        return made[architecture]

    return save


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models on many threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
