"""Weight names: one table per family, our name beside Hugging Face's, read in both directions."""

import re


def name_table(text: str, linears_as_is: bool = False) -> tuple:
    """Rows from lines "ours theirs" of modules, for weight and bias, or of one parameter where ours ends in "!".

    transposed: theirs is [out, in] as torch.nn.Linear has it, ours [in, out]. linears_as_is: theirs is [in, out] too.
    """
    rows = []
    for line in filter(str.strip, text.splitlines()):
        ours, theirs = line.split()
        if ours.endswith("!"):
            rows.append((ours[:-1], theirs, False))
            continue
        linear = ours.endswith(("_proj", "lm_head", "router", "shared_gate", "project_in", "project_out"))
        transposed = linear and not (linears_as_is and ours.startswith("layers."))
        rows.append((f"{ours}.weight", f"{theirs}.weight", transposed))
        rows.append((f"{ours}.bias", f"{theirs}.bias", False))
    return tuple(rows)


LLAMA_ATTENTION = """
    embed_tokens                    model.embed_tokens
    layers.{i}.attention_norm       model.layers.{i}.input_layernorm
    layers.{i}.attention.q_proj     model.layers.{i}.self_attn.q_proj
    layers.{i}.attention.k_proj     model.layers.{i}.self_attn.k_proj
    layers.{i}.attention.v_proj     model.layers.{i}.self_attn.v_proj
    layers.{i}.attention.o_proj     model.layers.{i}.self_attn.o_proj
    layers.{i}.attention.q_norm     model.layers.{i}.self_attn.q_norm
    layers.{i}.attention.k_norm     model.layers.{i}.self_attn.k_norm
    layers.{i}.mlp_norm             model.layers.{i}.post_attention_layernorm
    norm                            model.norm
    lm_head                         lm_head
"""


LLAMA_MLP = """
    layers.{i}.mlp.gate_proj        model.layers.{i}.mlp.gate_proj
    layers.{i}.mlp.up_proj          model.layers.{i}.mlp.up_proj
    layers.{i}.mlp.down_proj        model.layers.{i}.mlp.down_proj
"""


LLAMA_EXPERTS = """
    layers.{i}.mlp.router           model.layers.{i}.mlp.gate
    layers.{i}.mlp.experts.{e}.gate_proj  model.layers.{i}.mlp.experts.{e}.gate_proj
    layers.{i}.mlp.experts.{e}.up_proj    model.layers.{i}.mlp.experts.{e}.up_proj
    layers.{i}.mlp.experts.{e}.down_proj  model.layers.{i}.mlp.experts.{e}.down_proj
"""


NAMES_LLAMA = name_table(LLAMA_ATTENTION + LLAMA_MLP)


NAMES_MIXTRAL = name_table(LLAMA_ATTENTION + """
    layers.{i}.mlp.router           model.layers.{i}.block_sparse_moe.gate
    layers.{i}.mlp.experts.{e}.gate_proj  model.layers.{i}.block_sparse_moe.experts.{e}.w1
    layers.{i}.mlp.experts.{e}.up_proj    model.layers.{i}.block_sparse_moe.experts.{e}.w3
    layers.{i}.mlp.experts.{e}.down_proj  model.layers.{i}.block_sparse_moe.experts.{e}.w2
""")  # fmt: skip


NAMES_QWEN_MOE = name_table(LLAMA_ATTENTION + LLAMA_MLP + LLAMA_EXPERTS + """
    layers.{i}.mlp.shared.gate_proj model.layers.{i}.mlp.shared_expert.gate_proj
    layers.{i}.mlp.shared.up_proj   model.layers.{i}.mlp.shared_expert.up_proj
    layers.{i}.mlp.shared.down_proj model.layers.{i}.mlp.shared_expert.down_proj
    layers.{i}.mlp.shared_gate      model.layers.{i}.mlp.shared_expert_gate
""")  # fmt: skip


NAMES_DEEPSEEK = name_table(LLAMA_ATTENTION + LLAMA_MLP + LLAMA_EXPERTS + """
    layers.{i}.attention.q_a_proj   model.layers.{i}.self_attn.q_a_proj
    layers.{i}.attention.q_a_norm   model.layers.{i}.self_attn.q_a_layernorm
    layers.{i}.attention.q_b_proj   model.layers.{i}.self_attn.q_b_proj
    layers.{i}.attention.kv_a_proj  model.layers.{i}.self_attn.kv_a_proj_with_mqa
    layers.{i}.attention.kv_a_norm  model.layers.{i}.self_attn.kv_a_layernorm
    layers.{i}.attention.kv_b_proj  model.layers.{i}.self_attn.kv_b_proj
    layers.{i}.mlp.choice_bias!     model.layers.{i}.mlp.gate.e_score_correction_bias
    layers.{i}.mlp.shared.gate_proj model.layers.{i}.mlp.shared_experts.gate_proj
    layers.{i}.mlp.shared.up_proj   model.layers.{i}.mlp.shared_experts.up_proj
    layers.{i}.mlp.shared.down_proj model.layers.{i}.mlp.shared_experts.down_proj
""")  # fmt: skip


NAMES_QWEN = name_table("""
    embed_tokens                    transformer.wte
    layers.{i}.attention_norm       transformer.h.{i}.ln_1
    layers.{i}.attention.qkv_proj   transformer.h.{i}.attn.c_attn
    layers.{i}.attention.o_proj     transformer.h.{i}.attn.c_proj
    layers.{i}.mlp_norm             transformer.h.{i}.ln_2
    layers.{i}.mlp.gate_proj        transformer.h.{i}.mlp.w2
    layers.{i}.mlp.up_proj          transformer.h.{i}.mlp.w1
    layers.{i}.mlp.down_proj        transformer.h.{i}.mlp.c_proj
    norm                            transformer.ln_f
    lm_head                         lm_head
""")


NAMES_BAICHUAN = name_table("""
    embed_tokens                    model.embed_tokens
    layers.{i}.attention_norm       model.layers.{i}.input_layernorm
    layers.{i}.attention.qkv_proj   model.layers.{i}.self_attn.W_pack
    layers.{i}.attention.o_proj     model.layers.{i}.self_attn.o_proj
    layers.{i}.mlp_norm             model.layers.{i}.post_attention_layernorm
    norm                            model.norm
    lm_head                         lm_head
""" + LLAMA_MLP)  # fmt: skip


NAMES_CHATGLM = name_table("""
    embed_tokens                    transformer.word_embeddings
    layers.{i}.attention_norm       transformer.layers.{i}.input_layernorm
    layers.{i}.attention.qkv_proj   transformer.layers.{i}.attention.query_key_value
    layers.{i}.attention.o_proj     transformer.layers.{i}.attention.dense
    layers.{i}.mlp_norm             transformer.layers.{i}.post_attention_layernorm
    layers.{i}.mlp.up_proj          transformer.layers.{i}.mlp.dense_h_to_4h
    layers.{i}.mlp.down_proj        transformer.layers.{i}.mlp.dense_4h_to_h
    norm                            transformer.final_layernorm
    lm_head                         lm_head
""")


NAMES_CHATGLM2 = name_table("""
    embed_tokens                    transformer.embedding.word_embeddings
    layers.{i}.attention_norm       transformer.encoder.layers.{i}.input_layernorm
    layers.{i}.attention.qkv_proj   transformer.encoder.layers.{i}.self_attention.query_key_value
    layers.{i}.attention.o_proj     transformer.encoder.layers.{i}.self_attention.dense
    layers.{i}.mlp_norm             transformer.encoder.layers.{i}.post_attention_layernorm
    layers.{i}.mlp.gate_up_proj     transformer.encoder.layers.{i}.mlp.dense_h_to_4h
    layers.{i}.mlp.down_proj        transformer.encoder.layers.{i}.mlp.dense_4h_to_h
    norm                            transformer.encoder.final_layernorm
    lm_head                         transformer.output_layer
""")


NAMES_GLM = name_table(LLAMA_ATTENTION + """
    layers.{i}.attention_post_norm  model.layers.{i}.post_self_attn_layernorm
    layers.{i}.mlp.gate_up_proj     model.layers.{i}.mlp.gate_up_proj
    layers.{i}.mlp.down_proj        model.layers.{i}.mlp.down_proj
    layers.{i}.mlp_post_norm        model.layers.{i}.post_mlp_layernorm
""")  # fmt: skip


NAMES_BLOOM = name_table("""
    embed_tokens                    transformer.word_embeddings
    embed_norm                      transformer.word_embeddings_layernorm
    layers.{i}.attention_norm       transformer.h.{i}.input_layernorm
    layers.{i}.attention.qkv_proj   transformer.h.{i}.self_attention.query_key_value
    layers.{i}.attention.o_proj     transformer.h.{i}.self_attention.dense
    layers.{i}.mlp_norm             transformer.h.{i}.post_attention_layernorm
    layers.{i}.mlp.up_proj          transformer.h.{i}.mlp.dense_h_to_4h
    layers.{i}.mlp.down_proj        transformer.h.{i}.mlp.dense_4h_to_h
    norm                            transformer.ln_f
    lm_head                         lm_head
""")


NAMES_GPT2 = name_table("""
    embed_tokens                    transformer.wte
    embed_positions                 transformer.wpe
    layers.{i}.attention_norm       transformer.h.{i}.ln_1
    layers.{i}.attention.qkv_proj   transformer.h.{i}.attn.c_attn
    layers.{i}.attention.o_proj     transformer.h.{i}.attn.c_proj
    layers.{i}.mlp_norm             transformer.h.{i}.ln_2
    layers.{i}.mlp.up_proj          transformer.h.{i}.mlp.c_fc
    layers.{i}.mlp.down_proj        transformer.h.{i}.mlp.c_proj
    norm                            transformer.ln_f
    lm_head                         lm_head
""", linears_as_is=True)  # fmt: skip


NAMES_OPT = name_table("""
    embed_tokens                    model.decoder.embed_tokens
    embed_positions                 model.decoder.embed_positions
    project_in                      model.decoder.project_in
    project_out                     model.decoder.project_out
    layers.{i}.attention_norm       model.decoder.layers.{i}.self_attn_layer_norm
    layers.{i}.attention.q_proj     model.decoder.layers.{i}.self_attn.q_proj
    layers.{i}.attention.k_proj     model.decoder.layers.{i}.self_attn.k_proj
    layers.{i}.attention.v_proj     model.decoder.layers.{i}.self_attn.v_proj
    layers.{i}.attention.o_proj     model.decoder.layers.{i}.self_attn.out_proj
    layers.{i}.mlp_norm             model.decoder.layers.{i}.final_layer_norm
    layers.{i}.mlp.up_proj          model.decoder.layers.{i}.fc1
    layers.{i}.mlp.down_proj        model.decoder.layers.{i}.fc2
    norm                            model.decoder.final_layer_norm
    lm_head                         lm_head
""")


NAMES_INTERNLM2 = name_table("""
    embed_tokens                    model.tok_embeddings
    layers.{i}.attention_norm       model.layers.{i}.attention_norm
    layers.{i}.attention.qkv_proj   model.layers.{i}.attention.wqkv
    layers.{i}.attention.o_proj     model.layers.{i}.attention.wo
    layers.{i}.mlp_norm             model.layers.{i}.ffn_norm
    layers.{i}.mlp.gate_proj        model.layers.{i}.feed_forward.w1
    layers.{i}.mlp.up_proj          model.layers.{i}.feed_forward.w3
    layers.{i}.mlp.down_proj        model.layers.{i}.feed_forward.w2
    norm                            model.norm
    lm_head                         output
""")


NAMES_GEMMA2 = name_table(LLAMA_ATTENTION.replace(
    "layers.{i}.mlp_norm             model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp_norm             model.layers.{i}.pre_feedforward_layernorm",
) + LLAMA_MLP + """
    layers.{i}.attention_post_norm  model.layers.{i}.post_attention_layernorm
    layers.{i}.mlp_post_norm        model.layers.{i}.post_feedforward_layernorm
""")  # fmt: skip


IGNORED_WEIGHTS = re.compile(  # in published files: tables that are computed, and masks
    r"(rotary_emb|rotary_pos_emb)\.inv_freq$|\.attn\.(bias|masked_bias)$|\.rotary_emb\.(cos|sin)_cached$|"
    r"decoder\.version$"
)
