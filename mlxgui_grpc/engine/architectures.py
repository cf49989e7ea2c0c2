"""The architectures of mlx-lm whose rows are batched: those of which a test has shown that batch equals serial.

The test is tests/engine/test_batch_equals_serial.py, with tiny random models in float32, and what fails there is
served one row at a time. Imports nothing: the control process reads it too.

What "equal" means: the same tokens, but where two logits are so near to each other (1e-4) that the order of a sum
decides. Matrix products of different shapes add in different orders, so a row's logits depend in their last bits on how
many rows there are and how long the longest is, never on what the others say. Experts are chosen for each token by
itself, without a capacity to share.

What was found, on the CPU of Linux: no near tie at all among some 30,000 tokens of these models, nor with bfloat16 or
4-bit weights (llama, gemma3_text). On a GPU, one row and several are computed by different kernels, recurrent layers
have kernels of their own, and 16 bits make more ties: there `make equal` has to be run before more is claimed.
"""

_BATCHED = """
Klear afmoe apertus baichuan_m1 bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v3 cohere cohere2
dbrx deepseek deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe
falcon_h1 gear gemma gemma2 gemma3 gemma3_text gemma3n gemma4 gemma4_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa
gpt2 gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense internlm2
internlm3 iquestloopcoder jamba kimi_k25 kimi_linear kimi_vl laguna lfm2 lfm2-vl lfm2_moe lille-130m llama
llama4_text longcat_flash mamba mamba2 mellum mimo mimo_v2_flash minicpm minicpm3 minimax ministral3 mistral3
mistral4 mixtral muse_glimmer nanbeige nanochat nemotron nemotron_h olmo2 olmo3 olmo_hybrid olmoe openelm phi
phi3 phimoe phixtral pixtral plamo plamo2 qwen qwen2 qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_moe
qwen3_next qwen3_vl qwen3_vl_moe recurrent_gemma rwkv7 seed_oss smollm3 solar_open spark2_5 stablelm starcoder2
step3p5 talkie telechat3 youtu_llm
"""
BATCHED = frozenset(_BATCHED.split())
"""Modules of mlx_lm.models."""

_PREFILLED_ALONE = "baichuan_m1 bailing_moe_linear jamba mamba nemotron_h olmo_hybrid recurrent_gemma rwkv7"
PREFILLED_ALONE = frozenset(_PREFILLED_ALONE.split())
"""Of those, the ones whose recurrent layers take padding for tokens: their prompts are run one at a time."""

ALIASES = {
    "mistral": "llama",
    "llava": "mistral3",
    "phi-msft": "phixtral",
    "falcon_mamba": "mamba",
    "joyai_llm_flash": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "qwen2_5_vl": "qwen2_vl",
    "minimax_m2": "minimax",
    "iquestcoder": "llama",
    "xverse": "llama",
    "gemma4_unified": "gemma4",
    "deepseek_v41_text": "deepseek_v41",
}
"""mlx-lm's own names for some of the modules (its MODEL_REMAPPING)."""

_REASONS = {
    "afm7": "its last layers would give all rows the positions of the longest",
    "deepseek_v41": "its caches have no batch form",
    "gpt_bigcode": "all rows would get the positions of one",
    "llama4": "its attention in chunks keeps caches that have no batch form",
    "longcat_flash_ngram": "what it remembers of the last tokens has another length in each row",
    "phi3small": "its block-sparse attention knows no rows of different lengths",
    "plamo3": "a prompt and a reply see windows of different lengths, so that what is computed again differs",
}
"""Why the others, as far as it is known, give wrong answers in a batch."""

SCALED_BY_LENGTH = (
    "Requests to this model run one at a time: its rotary embedding is scaled by the length of the text so far, "
    "which is another one for each row of a batch."
)


def unknown_cache(names: set[str]) -> str:
    """What a user is told of a checkpoint whose layers keep something that has no batch form."""
    kinds = ", ".join(sorted(names))
    return f"Requests to this model run one at a time: its layers keep what has no batch form ({kinds})."


def is_batched(architecture: str) -> bool:
    """Whether rows of an architecture, a `model_type` or a module of mlx_lm.models, may share a batch."""
    return ALIASES.get(architecture, architecture) in BATCHED


def serial_note(architecture: str) -> str:
    """What a user is told of an architecture that is not batched; empty: it is."""
    if is_batched(architecture):
        return ""
    reason = _REASONS.get(ALIASES.get(architecture, architecture))
    why = reason or f"batching is not proven equal to serial decoding on the architecture '{architecture}'"
    return f"Requests to this model run one at a time: {why}."
