"""DeepSeek V4 of Hugging Face transformers through dsv4-backends, from the configuration to generated tokens.

    python examples/transformers_generate.py

The model is tiny and has random weights, so it runs anywhere in seconds, on a GPU if there is one.
"""

from __future__ import annotations

import torch
from tiny_deepseek_v4 import tiny, tokens

from dsv4_backends import reset, stats
from dsv4_backends.engines import transformers as engine

device = "cuda" if torch.cuda.is_available() else "cpu"
model = tiny(torch.bfloat16).to(device)
prompt = tokens(2, 140).to(device)
before = model.generate(prompt, max_new_tokens=4, do_sample=False)

print("what serves each part:")
for part in engine.enable(model):
    print(f"  {part}")

for name, cache in (("bf16 cache", None), ("packed cache", engine.packed_cache(model))):
    reset()
    made = model.generate(prompt, past_key_values=cache, max_new_tokens=6, do_sample=False)
    print(f"{name}: new tokens {made[:, prompt.shape[1] :].tolist()}")
    for op, providers in stats().items():
        print(f"  {op}: {providers}")

engine.disable(model)
again = model.generate(prompt, max_new_tokens=4, do_sample=False)
print("disabled: the same bits again:", torch.equal(again, before))
