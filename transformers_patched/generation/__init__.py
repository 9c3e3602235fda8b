"""Generation: greedy, sampling and exact beam search over many contexts at once.

    from transformers_patched.generation import generate
    texts = generate(model, contexts, max_new_tokens=64, num_beams=10, length_penalty=0.8)

`options` says what may be asked for, `rules` what the scores are and which hypotheses survive,
`cache` where keys and values lie, `scores` how the vocabulary is searched, `decoding` runs it all.
"""

from .generate import generate

__all__ = ["generate"]
