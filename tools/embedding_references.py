"""Makes, with torch and transformers, the vectors and scores that the tests hold ours to.

The project does not depend on torch: run this in an environment of its own that has torch, transformers and
safetensors (`python tools/embedding_references.py` writes `tests/fixtures/embeddings/references.json`). With
`--model FOLDER` it writes the vectors of a real checkpoint, pooled by the mean, to stdout instead.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found]
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support_encoders import (
    EMBEDDERS,
    MAX_TOKENS,
    QWEN3_END,
    REFERENCES,
    RERANKERS,
    build_encoder,
)

TEXTS = [
    "hello",
    "Hello world",
    "the cat sat on the mat",
    "the dog runs",
    "a",
    "0123456789",
    "What is the capital of France?",
    "Paris is the capital of France.",
    "the mat sat on the cat",
    "x = y + 1; print(x)",
    "été à Zürich: groß",
    "あ is a letter",
    "emoji \U0001f600 are unknown",
    "  spaces   around  ",
    "line\nbreaks\r\nand\ttabs",
    "the the the the the the the the the the the the",
    "on mat cat dog sat runs world hello what is capital of france the",
    "UPPER CASE AND lower case",
    "punctuation, everywhere! (really?) yes; no: \"quoted\" 'single'",
    "a longer text that goes on and on, word after word, so that it fills",
    "hello hello world world",
    "zzzzzzzzzz",
    "[CLS] is no token here",
    "1 + 1 = 2",
]
QUERY = "What is the capital of France?"


def main() -> None:
    """Write the references."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a real checkpoint")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if arguments.model:
        print(json.dumps({"texts": TEXTS, "vectors": embed(arguments.model, "bert", 512)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        vectors = {name: embed(build_encoder(Path(folder, name), name), name) for name in EMBEDDERS}
        scores = {name: rerank(build_encoder(Path(folder, name), name)) for name in RERANKERS}
    REFERENCES.parent.mkdir(parents=True, exist_ok=True)
    content = {"texts": TEXTS, "query": QUERY, "vectors": vectors, "scores": scores}
    REFERENCES.write_text(json.dumps(content, ensure_ascii=False) + "\n")


def embed(folder: Path, name: str, max_tokens: int = MAX_TOKENS) -> list[list[float]]:
    """Each text alone, so that nothing is filled up."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model = model.float().eval()
    vectors = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=False, padding=False)["input_ids"]
        if name == "qwen3":
            ids = [*ids, QWEN3_END]
        assert len(ids) <= max_tokens, (text, len(ids))
        states: Any = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        pooled = {"qwen3": states[-1], "bert-cls": states[0]}.get(name, states.mean(dim=0))
        unit = torch.nn.functional.normalize(pooled, dim=-1)
        vectors.append([round(number, 7) for number in unit.tolist()])
    return vectors


def rerank(folder: Path) -> list[float]:
    """The score of each text as an answer to `QUERY`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
    scores = []
    for text in TEXTS:
        inputs = tokenizer(
            QUERY,
            text,
            truncation=False,
            padding=False,
            return_token_type_ids="bert-reranker" in folder.name and "modern" not in folder.name,
            return_tensors="pt",
        )
        assert inputs["input_ids"].shape[1] <= MAX_TOKENS, text
        scores.append(torch.sigmoid(model(**inputs).logits[0, 0]).item())
    return scores


if __name__ == "__main__":
    main()
