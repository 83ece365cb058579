"""Vision-language models as judges, behind any server that speaks OpenAI's chat format (vLLM, SGLang)."""
