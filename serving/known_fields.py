"""The fields of a request for completions or chat completions: read, harmless, under another name, or refused.

    body = known_body(parse_body(data), is_chat=True)     # what fields.py reads; HTTPError 400 names a field

The harmless ones are what clients send and what changes no text: who asks, how it is paid, how a model is kept loaded.
"""

from serving.fields import NUMBERS, REFUSED, bad_request, take_field, unknown_field

READ = {*NUMBERS, *"""model stream stream_options n best_of max_tokens stop stop_token_ids logit_bias bad_words
    allowed_token_ids logprobs response_format structured_outputs guided_json guided_regex guided_choice json_schema
    tools tool_choice""".split()}  # fmt: skip
CHATS = set(
    """messages parallel_tool_calls max_completion_tokens top_logprobs chat_template_kwargs reasoning_effort
    thinking_token_budget include_reasoning continue_final_message add_generation_prompt""".split()
)
COMPLETIONS = {"prompt", "echo"}
HARMLESS = set(
    """user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention verbosity
    priority request_id guided_decoding_backend cache_prompt id_slot slot_id timings_per_token return_progress
    keep_alive num_ctx num_keep num_batch num_gpu main_gpu num_thread numa low_vram use_mmap use_mlock
    session_id chat_id id usage
    mirostat_tau mirostat_eta mirostat_lr dry_base dry_allowed_length dry_sequence_breakers dry_penalty_last_n
    xtc_threshold dynatemp_exponent smoothing_curve""".split()
)  # the last two lines act with fields of NEUTRAL alone

# Of one kind of request, or known from other servers: the values that change nothing.
NEUTRAL = {"detokenize": (True,), "spaces_between_special_tokens": (True,), "xtc_probability": (0,), "top_a": (0,),
           "tfs_z": (1,), "tfs": (1,), "mirostat_mode": (0,), "dynatemp_range": (0,), "smoothing_factor": (0,),
           "epsilon_cutoff": (0,), "eta_cutoff": (0,), "return_tokens_as_token_ids": (False,), "transforms": ([],),
           "add_bos_token": (True,)}  # fmt: skip
NEUTRAL_IN_CHATS = {"echo": (False,), "prompt": ()}
NEUTRAL_IN_COMPLETIONS = {"parallel_tool_calls": (True, False), "top_logprobs": (), "chat_template_kwargs": ({},),
                          "include_reasoning": (True,), "continue_final_message": (False,), "messages": (),
                          "add_generation_prompt": (True,)}  # fmt: skip
USE = {"max_completion_tokens": "max_tokens", "top_logprobs": "logprobs", "messages": "prompt", "prompt": "messages"}
SWITCHES = ("enable_thinking", "think", "thinking")  # of thoughts, as Qwen, Ollama and GLM name them
OLLAMA = {"num_predict": "max_tokens", "repeat_penalty": "repetition_penalty"}


def known_body(body: dict, is_chat: bool) -> dict:
    """The body of a request under the names that are read here. HTTPError 400 for a field that is not known."""
    body = _with_options(body)
    if is_chat:
        body = _with_thinking(body)
    known = READ | (CHATS if is_chat else COMPLETIONS)
    neutral = REFUSED | NEUTRAL | (NEUTRAL_IN_CHATS if is_chat else NEUTRAL_IN_COMPLETIONS)
    for name, value in body.items():
        if value is None or name in known or name in HARMLESS:
            continue
        if name in neutral and value in neutral[name]:
            continue
        if not is_chat and name in CHATS or is_chat and name in COMPLETIONS:
            instead = f"; give {USE[name]}" if name in USE else ""
            raise bad_request(
                f"{name}: only {'completions' if is_chat else 'chats'} have it{instead}", name, "unsupported_parameter"
            )
        raise unknown_field(name, known | HARMLESS, name in neutral)
    return body


def _with_options(body):
    """Ollama's `options`, and its name of repetition_penalty: what the request itself says goes first."""
    options = take_field(body, "options", dict) or {}
    if options.get("num_predict") in (-1, -2):
        options = {name: value for name, value in options.items() if name != "num_predict"}
    named = {OLLAMA.get(name, name): value for name, value in options.items()}
    if "repeat_penalty" in body:
        named["repetition_penalty"] = body["repeat_penalty"]
    return named | {name: value for name, value in body.items() if name not in ("options", "repeat_penalty")}


def _with_thinking(body):
    """A switch of thoughts beside the messages becomes one of the chat template's."""
    given = {}
    for name in SWITCHES:
        value = body.get(name)
        if name == "thinking" and isinstance(value, dict) and value.get("type") in ("enabled", "disabled", "auto"):
            value = value["type"] != "disabled"
        if value is not None and not isinstance(value, bool):
            expected = '{"type": "enabled" or "disabled"}' if name == "thinking" else "true or false"
            raise bad_request(f"{name}: must be {expected}", name)
        given |= {} if value is None else {"enable_thinking": value}
    body = {name: value for name, value in body.items() if name not in SWITCHES}
    if given:
        body["chat_template_kwargs"] = given | (take_field(body, "chat_template_kwargs", dict) or {})
    return body
