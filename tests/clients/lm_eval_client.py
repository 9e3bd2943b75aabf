"""lm-eval's local-completions: log-likelihoods of continuations by echo with logprobs, and greedy generation.

Run with a Python that has lm-eval and transformers: lm_eval_client.py URL FOLDER_OF_THE_TOKENIZER. It prints, as JSON
in the last line, [[log-likelihood, is greedy], …] of PAIRS and the generated text; the test compares them with the
model's own.
"""

import json
import sys

from common import base_url, held, package

PAIRS = [("The red dress", " is made of"), ("A", " coat and a"), ("This linen shirt has", " a collar.")]

if __name__ == "__main__":
    package("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    client = LocalCompletionsAPI(
        base_url=f"{base_url()}/v1/completions",
        model=sys.argv[3],
        tokenizer=sys.argv[2],
        max_retries=1,
        tokenizer_backend="huggingface",
        num_concurrent=1,
        batch_size=2,
        max_length=256,
    )
    found = client.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)])
    held(f"loglikelihood: {found}")
    asked = [
        Instance("generate_until", {}, (PAIRS[0][0], {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}), 0)
    ]
    text = client.generate_until(asked)[0]
    held(f"generate_until: {text!r}")
    rolling = client.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("".join(PAIRS[0]),), 0)])
    held(f"loglikelihood_rolling: {rolling}")
    print(json.dumps([found, text, rolling]))
