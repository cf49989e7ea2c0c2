"""Trains the demo model: a tiny Qwen3 that answers the fixed list of `demo_corpus.py` word for word.

    python tools/train_demo.py --out DIR --minutes 16
    python tools/train_demo.py --check DIR --prompts tests/demo_prompts.json

Nothing is downloaded. `--minutes` is CPU time of this process; a run prints how many steps it took, and
`--steps` with that number repeats it on the same kind of machine. Run it through tools/openblas.sh on Linux:
the matrix products of the mlx wheel are 20 times slower without OpenBLAS.

The committed weights came from three runs: 6167 steps as above (on an earlier, smaller corpus), then --resume for
2442 steps with --learning-rate 2e-3 --fixed-share 0.25 --seed 21, then for 600 with 8e-4, 0.45 and 22. A model
trained anew differs in its weights; what it has to match is the list, which --check verifies.

`--check` loads the directory as the server does (mlx_lm.load), decodes every prompt of the list greedily,
alone and in a continuous batch, and reports exact matches and the margins between the best and the second
token. It fails if an answer is wrong, or so unsure that the rounding of another batch shape could change it.
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from demo_corpus import Dialogue, fixed_dialogues
from demo_sampler import Sampler
from mlx.nn.layers.base import Module
from mlx.nn.losses import cross_entropy
from mlx.nn.utils import value_and_grad
from mlx_lm import load
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import save_config, save_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# mx.compile would start g++ for every new shape on CPU.
mx.disable_compile()

SEED = 20
VOCABULARY = 1024
CONTEXT = 4096
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# In the vocabulary, but not "special": decoding keeps them, as the Qwen3 tokenizer does.
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
MARGIN_WANTED = 0.3

# A tool is shown to the model as a signature with sorted parameter names, so that the order of the keys in a
# caller's JSON schema does not matter. mlx-lm infers its tool parser from "<tool_call>" and "tool_call.name".
CHAT_TEMPLATE = Path(__file__).with_name("demo_chat_template.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Example:
    """The tokens of one dialogue; the first `prompt_count` of them are given, the rest are to be learnt."""

    tokens: list[int]
    prompt_count: int


@dataclass(frozen=True)
class Run:
    """How long and on what to train."""

    # CPU time of this process; unused where `steps` is set.
    minutes: float
    steps: int | None
    learning_rate: float
    batch_tokens: int
    # The part of the examples that come from the fixed list, 0 to 1.
    fixed_share: float
    seed: int


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the corpus: every string survives encoding and decoding.

    Only ASCII text forms merges, so that an accent, a Chinese character or an emoji always takes several byte
    tokens: streaming has to put them together again.
    """
    tokenizer = Tokenizer(models.BPE())
    pattern = r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sampler = Sampler(SEED)
    texts = []
    for dialogue in itertools.chain(fixed_dialogues(), (sampler.dialogue(0.0) for _ in range(4000))):
        spoken = [message["content"] for message in dialogue.messages or []]
        words = " ".join([*spoken, dialogue.prompt or "", dialogue.answer])
        texts.append("".join(letter for letter in words if letter.isascii()))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKERS),
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    fast.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The config.json of the model. All widths are multiples of 64, so that it can be quantized."""
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, END_OF_TEXT)]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": None,
        "dtype": "float32",
        "eos_token_id": ends,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 384,
        "max_position_embeddings": CONTEXT,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
    }


def prompt_tokens(tokenizer: Any, dialogue: Dialogue) -> list[int]:
    """The prompt of a dialogue as the server tokenizes it."""
    if dialogue.prompt is not None:
        return list(tokenizer.encode(dialogue.prompt))
    text = tokenizer.apply_chat_template(
        dialogue.messages,
        tools=dialogue.tools or None,
        add_generation_prompt=True,
        enable_thinking=dialogue.thinking,
        tokenize=False,
    )
    return list(tokenizer.encode(text))


def encode(tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> Example:
    prompt = prompt_tokens(tokenizer, dialogue)
    end = END_OF_TEXT if dialogue.prompt is not None else TURN_END
    answer = [*tokenizer.encode(dialogue.answer), tokenizer.convert_tokens_to_ids(end)]
    return Example(prompt + answer, len(prompt))


def batches(tokenizer: PreTrainedTokenizerFast, run: Run, pool_size: int = 3000) -> Iterator[list[Example]]:
    """Batches without end, of about `run.batch_tokens` tokens each, of examples of similar length."""
    sampler, rng = Sampler(run.seed), random.Random(run.seed)
    while True:
        pool = [encode(tokenizer, sampler.dialogue(run.fixed_share)) for _ in range(pool_size)]
        pool.sort(key=lambda example: len(example.tokens) + 10 * rng.random())
        groups: list[list[Example]] = [[]]
        for example in pool:
            longest = max(len(member.tokens) for member in [*groups[-1], example])
            if groups[-1] and longest * (len(groups[-1]) + 1) > run.batch_tokens:
                groups.append([])
            groups[-1].append(example)
        rng.shuffle(groups)
        yield from groups


def arrays(batch: list[Example]) -> tuple[mx.array, mx.array]:
    """Padded tokens, and the weight of each as a target: 1 in answers, 0 in prompts and padding."""
    length = max(len(example.tokens) for example in batch)
    tokens = np.zeros((len(batch), length), np.int32)
    weights = np.zeros((len(batch), length), np.float32)
    for row, example in enumerate(batch):
        count = len(example.tokens)
        tokens[row, :count] = example.tokens
        weights[row, example.prompt_count : count] = 1
    return mx.array(tokens), mx.array(weights)


def loss(model: Module, tokens: mx.array, weights: mx.array) -> mx.array:
    losses = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def train(model: Module, tokenizer: PreTrainedTokenizerFast, out: Path, run: Run) -> int:
    """Trains the model and returns the steps taken; the weights so far are written every two minutes.

    The learning rate rises over the first 100 steps and then falls along a cosine over the whole run.
    """
    optimizer = optim.AdamW(learning_rate=run.learning_rate, betas=[0.9, 0.98], weight_decay=0.02)
    step_gradient = value_and_grad(model, loss)
    started, smooth, seen = time.process_time(), 0.0, 0
    saved = started
    step = 0
    for step, batch in enumerate(batches(tokenizer, run)):
        spent = time.process_time() - started
        progress = step / run.steps if run.steps is not None else spent / (run.minutes * 60)
        if progress >= 1:
            break
        falling = 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.learning_rate = run.learning_rate * min(1, (step + 1) / 100) * (0.01 + 0.99 * falling)
        tokens, weights = arrays(batch)
        value, gradient = step_gradient(model, tokens, weights)
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state, value)
        smooth = value.item() if step == 0 else 0.98 * smooth + 0.02 * value.item()
        seen += tokens.size
        if step % 50 == 0:
            print(
                f"step {step:5} loss {smooth:.4f} cpu {spent:5.0f} s, {seen / max(spent, 1):.0f} tokens/s",
                flush=True,
            )
        if time.process_time() - saved > 120:
            saved = time.process_time()
            save_weights(model, out)
    return step


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the tokenizer under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for session_only in ("backend", "is_local", "local_files_only"):
        settings.pop(session_only, None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_weights(model: Module, out: Path) -> None:
    """Writes the weights beside their place and moves them in, so that a reader never sees half a file."""
    fresh = out / ".fresh"
    fresh.mkdir(exist_ok=True)
    save_model(fresh, model)
    for path in fresh.iterdir():
        path.replace(out / path.name)
    fresh.rmdir()


def build(out: Path, resumed: Path | None, run: Run) -> None:
    """Trains a model, or the one in the directory `resumed` further, and writes its directory."""
    out.mkdir(parents=True, exist_ok=True)
    if resumed is None:
        tokenizer = build_tokenizer()
    else:
        # Its tokens mean something only with the tokenizer that it began with.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(resumed)
        tokenizer.chat_template = CHAT_TEMPLATE
    config = model_config(tokenizer)
    save_tokenizer(tokenizer, out)
    save_config(dict(config), out / "config.json")
    (out / "generation_config.json").write_text(
        json.dumps({"eos_token_id": config["eos_token_id"]}, indent=4) + "\n"
    )
    mx.random.seed(run.seed)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    if resumed is not None:
        model.load_weights(str(resumed / "model.safetensors"))
    else:
        # The default embeddings are too large for tied logits.
        embedding = model.model.embed_tokens
        embedding.weight = mx.random.normal(embedding.weight.shape) * 0.05
    mx.eval(model.parameters())
    steps = train(model, tokenizer, out, run)
    save_weights(model, out)
    print(f"{steps} steps, {time.process_time():.0f} s of CPU time in all, written to {out}", flush=True)


def decode_alone(
    model: Module, tokenizer: Any, prompt: list[int], most: int = 600
) -> tuple[list[int], float]:
    """Greedy tokens of one prompt, and the smallest margin between the best and the second logit."""
    cache = make_prompt_cache(model)
    tokens: list[int] = []
    margin = math.inf
    fed = mx.array([prompt])
    while len(tokens) < most:
        logits = model(fed, cache=cache)[0, -1]
        second, best = np.argsort(np.array(logits))[-2:].tolist()
        margin = min(margin, float(np.array(logits[best] - logits[second])))
        if best in tokenizer.eos_token_ids:
            break
        tokens.append(best)
        fed = mx.array([[best]])
    return tokens, margin


def decode_together(
    model: Module, tokenizer: Any, prompts: list[list[int]], most: int = 600
) -> list[list[int]]:
    """Greedy tokens of all prompts from mlx-lm's continuous batch, at most 16 rows at a time."""
    ends = [[token] for token in tokenizer.eos_token_ids]
    generator = BatchGenerator(model, max_tokens=most, stop_tokens=ends, completion_batch_size=16)
    rows: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts)}
    open_rows = set(rows)
    while open_rows:
        for response in generator.next_generated():
            if response.finish_reason != "stop":
                rows[response.uid].append(response.token)
            if response.finish_reason is not None:
                open_rows.discard(response.uid)
    generator.close()
    return list(rows.values())


def check(directory: Path, prompts_path: Path | None) -> int:
    """Reports how the model answers the fixed list; returns the count of wrong or unsure answers.

    With `prompts_path`, writes the list of the prompts that it answers exactly and surely, for the tests.
    """
    model, tokenizer = load(str(directory))[:2]
    dialogues = fixed_dialogues()
    prompts = [prompt_tokens(tokenizer, dialogue) for dialogue in dialogues]
    together = decode_together(model, tokenizer, prompts)
    kept, wrong, unsure, counts = [], 0, 0, Counter[str]()
    margins: list[tuple[float, int]] = []
    asked = Counter(dialogue.kind for dialogue in dialogues)
    for place, (dialogue, prompt, batch_tokens) in enumerate(zip(dialogues, prompts, together, strict=True)):
        tokens, margin = decode_alone(model, tokenizer, prompt)
        text, batch_text = tokenizer.decode(tokens), tokenizer.decode(batch_tokens)
        exact = text == batch_text == dialogue.answer
        if not exact:
            wrong += 1
            print(f"WRONG {dialogue.kind} {shown(dialogue)}")
            print(f"  want {dialogue.answer[-150:]!r}\n  got  {text[-150:]!r}")
            if batch_text != text:
                print(f"  in a batch {batch_text[-150:]!r}")
        elif margin < MARGIN_WANTED:
            unsure += 1
            print(f"UNSURE ({margin:.2f}) {dialogue.kind} {shown(dialogue)}")
        else:
            kept.append(dialogue)
            counts[dialogue.kind] += 1
            margins.append((margin, place))
    print(f"{len(kept)} of {len(dialogues)} exact and sure, {wrong} wrong, {unsure} unsure")
    print(", ".join(f"{kind} {counts[kind]}/{count}" for kind, count in asked.items()))
    for margin, place in sorted(margins)[:8]:
        print(f"margin {margin:.2f}: {shown(dialogues[place])}")
    lengths = [len(row) for row in together]
    print(f"median margin {sorted(margins)[len(margins) // 2][0]:.2f}, longest answer {max(lengths)} tokens")
    if prompts_path is not None:
        write_prompts(kept, prompts_path)
    return wrong + unsure


def shown(dialogue: Dialogue) -> str:
    messages = dialogue.messages or []
    return repr(
        dialogue.prompt or " / ".join(f"{message['role']}: {message['content']}" for message in messages)
    )


def write_prompts(dialogues: list[Dialogue], path: Path) -> None:
    """Writes the prompts and exact answers as the JSON list that the tests read."""
    numbers = Counter[str]()
    listed = []
    for dialogue in dialogues:
        numbers[dialogue.kind] += 1
        entry: dict[str, Any] = {"id": f"{dialogue.kind}-{numbers[dialogue.kind]:02}", "kind": dialogue.kind}
        if dialogue.prompt is not None:
            entry["prompt"] = dialogue.prompt
        else:
            entry["messages"] = dialogue.messages
        if dialogue.tools:
            entry["tools"] = dialogue.tools
        if dialogue.thinking:
            entry["template_arguments"] = {"enable_thinking": True}
        entry["expect"] = dialogue.answer
        listed.append(entry)
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in listed)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(listed)} prompts written to {path}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="directory to write the model to")
    parser.add_argument("--minutes", type=float, default=16, help="CPU minutes to train (default: 16)")
    parser.add_argument("--steps", type=int, help="steps to train, instead of --minutes")
    parser.add_argument("--resume", type=Path, help="directory of a model to train further")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--batch-tokens", type=int, default=800)
    parser.add_argument(
        "--fixed-share", type=float, default=0.45, help="part of the examples from the fixed list"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--check", type=Path, help="directory of a model to check")
    parser.add_argument("--prompts", type=Path, help="with --check: file for the list of exact answers")
    arguments = parser.parse_args()
    if not arguments.out and not arguments.check:
        parser.error("give --out DIR, --check DIR or both")
    if arguments.out:
        names = ("minutes", "steps", "learning_rate", "batch_tokens", "fixed_share", "seed")
        build(arguments.out, arguments.resume, Run(**{name: getattr(arguments, name) for name in names}))
    return 1 if arguments.check and check(arguments.check, arguments.prompts) else 0


if __name__ == "__main__":
    sys.exit(main())
