"""Groups of models worth trying, by the document's titles and in its order; repositories of the public hub."""

CATEGORIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "Popular Text Models",
        (
            "mlx-community/Llama-3.2-3B-Instruct-4bit",
            "mlx-community/Qwen2.5-7B-Instruct-4bit",
            "mlx-community/Qwen3-4B-4bit",
            "mlx-community/Qwen3-8B-4bit",
            "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
            "mlx-community/gemma-3-12b-it-qat-4bit",
        ),
    ),
    (
        "Vision Models",
        (
            "mlx-community/Llama-3.2-11B-Vision-Instruct-4bit",
            "mlx-community/Qwen2.5-VL-3B-Instruct-4bit",
            "mlx-community/Qwen2.5-VL-7B-Instruct-4bit",
            "mlx-community/SmolVLM-Instruct-4bit",
        ),
    ),
    (
        "Multimodal Models",
        (
            "mlx-community/Qwen2-VL-2B-Instruct-4bit",
            "mlx-community/gemma-3-4b-it-qat-4bit",
            "mlx-community/gemma-3n-E4B-it-4bit",
        ),
    ),
    (
        "Code Models",
        (
            "mlx-community/CodeLlama-7B-Instruct-4bit",
            "mlx-community/Qwen2.5-Coder-7B-Instruct-4bit",
            "mlx-community/Qwen2.5-Coder-14B-Instruct-4bit",
            "mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit",
        ),
    ),
    (
        "Chat Models",
        (
            "mlx-community/Mistral-7B-Instruct-v0.3-4bit",
            "mlx-community/Mistral-Nemo-Instruct-2407-4bit",
            "mlx-community/gpt-oss-20b-MXFP4-Q8",
            "mlx-community/Qwen3-30B-A3B-4bit",
        ),
    ),
    (
        "Small Models (< 10GB)",
        (
            "mlx-community/Phi-3.5-mini-instruct-4bit",
            "mlx-community/Qwen3-0.6B-4bit",
            "mlx-community/Llama-3.2-1B-Instruct-4bit",
            "mlx-community/gemma-3-1b-it-4bit",
            "mlx-community/Qwen3-1.7B-4bit",
        ),
    ),
    (
        "Large Models (> 50GB)",
        (
            "mlx-community/Llama-3.1-70B-Instruct-4bit",
            "mlx-community/Mistral-Large-Instruct-2407-4bit",
            "mlx-community/Qwen3-235B-A22B-4bit",
            "mlx-community/gpt-oss-120b-MXFP4-Q8",
        ),
    ),
)
"""Title and hub ids of each group, the best first."""
