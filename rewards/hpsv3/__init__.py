"""HPSv3: what people would prefer, by a Qwen2-VL-7B that ends in two numbers. Nothing in here imports torch early."""
