//! What a recipe promises: the role of every tensor of the known model families, one order of precedence, and a text
//! that makes the same choices again.

use proptest::prelude::*;
use tenpak::fit::Rate;
use tenpak::recipe::Role::{Attention, Embedding, Head, Linear, Mlp, NotFloat, Other, Router, Small};
use tenpak::recipe::{Choice, Reason, Recipe, Role};
use tenpak::{Codec, DType, Error, TensorInfo, codecs};

fn codec(id: &str) -> &'static Codec {
    codecs::get(id).unwrap()
}

fn info(name: &str, shape: &[u64]) -> TensorInfo {
    TensorInfo::new(name, DType::BF16, shape.to_vec()).unwrap()
}

fn recipe() -> Recipe {
    Recipe::new(codec("int4_g16_fp16_v1"))
}

fn choose(recipe: &Recipe, name: &str, shape: &[u64]) -> Choice {
    let info = info(name, shape);
    recipe.choose(&info, info.matrix().1)
}

fn id(recipe: &Recipe, name: &str) -> &'static str {
    choose(recipe, name, &[256, 256]).codec.id
}

fn refusal(toml: &str) -> String {
    let message = Recipe::from_toml(toml).unwrap_err().to_string();
    assert!(!message.contains('\n') && !message.ends_with('.'), "{message:?}");
    message
}

/// Names and shapes as their checkpoints have them.
const NAMES: &[(&str, &str, &[u64], Role)] = &[
    ("llama", "model.embed_tokens.weight", &[32000, 4096], Embedding),
    ("llama", "model.layers.0.self_attn.q_proj.weight", &[4096, 4096], Attention),
    ("llama", "model.layers.0.self_attn.k_proj.weight", &[1024, 4096], Attention),
    ("llama", "model.layers.0.self_attn.v_proj.weight", &[1024, 4096], Attention),
    ("llama", "model.layers.0.self_attn.o_proj.weight", &[4096, 4096], Attention),
    ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", &[64], Small),
    ("llama", "model.layers.0.mlp.gate_proj.weight", &[11008, 4096], Mlp),
    ("llama", "model.layers.0.mlp.up_proj.weight", &[11008, 4096], Mlp),
    ("llama", "model.layers.0.mlp.down_proj.weight", &[4096, 11008], Mlp),
    ("llama", "model.layers.0.input_layernorm.weight", &[4096], Small),
    ("llama", "model.norm.weight", &[4096], Small),
    ("llama", "lm_head.weight", &[32000, 4096], Head),
    ("llama original", "tok_embeddings.weight", &[32000, 4096], Embedding),
    ("llama original", "layers.0.attention.wq.weight", &[4096, 4096], Attention),
    ("llama original", "layers.0.attention.wo.weight", &[4096, 4096], Attention),
    ("llama original", "layers.0.feed_forward.w1.weight", &[11008, 4096], Mlp),
    ("llama original", "layers.0.attention_norm.weight", &[4096], Small),
    ("llama original", "output.weight", &[32000, 4096], Head),
    ("llama original", "rope.freqs", &[64], Small),
    ("llama 4", "language_model.model.layers.1.feed_forward.experts.gate_up_proj", &[16, 5120, 16384], Mlp),
    ("llama 4", "language_model.model.layers.1.feed_forward.experts.down_proj", &[16, 8192, 5120], Mlp),
    ("llama 4", "language_model.model.layers.1.feed_forward.router.weight", &[16, 5120], Router),
    ("llama 4", "language_model.model.layers.1.feed_forward.shared_expert.up_proj.weight", &[8192, 5120], Mlp),
    ("llama 4", "language_model.lm_head.weight", &[202048, 5120], Head),
    ("mistral", "model.layers.31.self_attn.v_proj.weight", &[1024, 4096], Attention),
    ("mistral original", "layers.0.attention.wk.weight", &[1024, 4096], Attention),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", &[8, 4096], Router),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w1.weight", &[14336, 4096], Mlp),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w2.weight", &[4096, 14336], Mlp),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w3.weight", &[14336, 4096], Mlp),
    ("qwen 1", "transformer.wte.weight", &[151936, 4096], Embedding),
    ("qwen 1", "transformer.h.0.attn.c_attn.weight", &[12288, 4096], Attention),
    ("qwen 1", "transformer.h.0.attn.c_attn.bias", &[12288], Small),
    ("qwen 1", "transformer.h.0.attn.c_proj.weight", &[4096, 4096], Attention),
    ("qwen 1", "transformer.h.0.mlp.w1.weight", &[11008, 4096], Mlp),
    ("qwen 1", "transformer.h.0.mlp.c_proj.weight", &[4096, 11008], Mlp),
    ("qwen 2", "model.layers.0.self_attn.q_proj.bias", &[3584], Small),
    ("qwen 2", "model.layers.0.mlp.gate_proj.weight", &[18944, 3584], Mlp),
    ("qwen 2 moe", "model.layers.0.mlp.gate.weight", &[60, 2048], Router),
    ("qwen 2 moe", "model.layers.0.mlp.shared_expert_gate.weight", &[1, 2048], Router),
    ("qwen 2 moe", "model.layers.0.mlp.shared_expert.gate_proj.weight", &[5632, 2048], Mlp),
    ("qwen 2 moe", "model.layers.0.mlp.experts.59.down_proj.weight", &[2048, 1408], Mlp),
    ("qwen 2 vl", "visual.patch_embed.proj.weight", &[1280, 3, 2, 14, 14], Other),
    ("qwen 2 vl", "visual.blocks.0.attn.qkv.weight", &[3840, 1280], Attention),
    ("qwen 2 vl", "visual.merger.mlp.0.weight", &[5120, 5120], Mlp),
    ("qwen 3", "model.layers.0.self_attn.q_norm.weight", &[128], Small),
    ("qwen 3 moe", "model.layers.0.mlp.experts.127.gate_proj.weight", &[768, 2048], Mlp),
    ("qwen 3 next", "model.layers.0.linear_attn.in_proj_qkvz.weight", &[12288, 2048], Attention),
    ("qwen 3 next", "model.layers.0.linear_attn.conv1d.weight", &[8192, 1, 4], Other),
    ("gpt-2", "wte.weight", &[50257, 768], Embedding),
    ("gpt-2", "wpe.weight", &[1024, 768], Embedding),
    ("gpt-2", "h.0.ln_1.weight", &[768], Small),
    ("gpt-2", "h.0.attn.bias", &[1, 1, 1024, 1024], Small),
    ("gpt-2", "h.0.attn.c_attn.weight", &[768, 2304], Attention),
    ("gpt-2", "h.0.attn.c_proj.weight", &[768, 768], Attention),
    ("gpt-2", "h.0.mlp.c_fc.weight", &[768, 3072], Mlp),
    ("gpt-2", "transformer.h.0.mlp.c_proj.weight", &[3072, 768], Mlp),
    ("gpt-2 flax", "transformer/h/0/attn/c_proj/kernel", &[768, 768], Attention),
    ("gpt-j", "transformer.h.0.attn.out_proj.weight", &[4096, 4096], Attention),
    ("gpt-j", "transformer.h.0.mlp.fc_in.weight", &[16384, 4096], Mlp),
    ("gpt-neo", "transformer.h.0.attn.attention.out_proj.weight", &[768, 768], Attention),
    ("gpt-oss", "model.layers.0.mlp.router.weight", &[32, 2880], Router),
    ("gpt-oss", "model.layers.0.mlp.experts.gate_up_proj", &[32, 2880, 5760], Mlp),
    ("gpt-oss", "model.layers.0.mlp.experts.gate_up_proj_bias", &[32, 5760], Small),
    ("pythia", "gpt_neox.embed_in.weight", &[50304, 512], Embedding),
    ("pythia", "gpt_neox.layers.0.attention.query_key_value.weight", &[1536, 512], Attention),
    ("pythia", "gpt_neox.layers.0.attention.dense.weight", &[512, 512], Attention),
    ("pythia", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", &[8], Small),
    ("pythia", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", &[2048, 512], Mlp),
    ("pythia", "gpt_neox.layers.0.mlp.dense_4h_to_h.weight", &[512, 2048], Mlp),
    ("pythia", "gpt_neox.final_layer_norm.weight", &[512], Small),
    ("pythia", "embed_out.weight", &[50304, 512], Head),
    ("opt", "model.decoder.embed_tokens.weight", &[50272, 768], Embedding),
    ("opt", "model.decoder.embed_positions.weight", &[2050, 768], Embedding),
    ("opt", "model.decoder.layers.0.self_attn.out_proj.weight", &[768, 768], Attention),
    ("opt", "model.decoder.layers.0.fc1.weight", &[3072, 768], Mlp),
    ("opt", "model.decoder.layers.0.fc2.weight", &[768, 3072], Mlp),
    ("opt", "model.decoder.project_in.weight", &[1024, 512], Linear),
    ("phi 1", "layers.1.mixer.Wqkv.weight", &[6144, 2048], Attention),
    ("phi 2", "model.layers.0.self_attn.dense.weight", &[2560, 2560], Attention),
    ("phi 2", "model.layers.0.mlp.fc1.weight", &[10240, 2560], Mlp),
    ("phi 3", "model.layers.0.self_attn.qkv_proj.weight", &[9216, 3072], Attention),
    ("phi 3", "model.layers.0.mlp.gate_up_proj.weight", &[16384, 3072], Mlp),
    ("gemma", "model.layers.0.pre_feedforward_layernorm.weight", &[2304], Small),
    ("gemma", "model.layers.0.mlp.down_proj.weight", &[2304, 9216], Mlp),
    ("gemma 3", "language_model.model.embed_tokens.weight", &[262208, 2560], Embedding),
    ("gemma 3", "multi_modal_projector.mm_input_projection_weight", &[1152, 2560], Linear),
    ("gemma 3", "vision_tower.vision_model.embeddings.patch_embedding.weight", &[1152, 3, 14, 14], Other),
    ("gemma 3", "vision_tower.vision_model.embeddings.position_embedding.weight", &[4096, 1152], Embedding),
    ("falcon", "transformer.word_embeddings.weight", &[65024, 4544], Embedding),
    ("falcon", "transformer.h.0.self_attention.query_key_value.weight", &[4672, 4544], Attention),
    ("falcon", "transformer.h.0.self_attention.dense.weight", &[4544, 4544], Attention),
    ("falcon", "transformer.h.0.mlp.dense_h_to_4h.weight", &[18176, 4544], Mlp),
    ("bloom", "word_embeddings_layernorm.weight", &[1024], Small),
    ("bloom", "h.0.self_attention.dense.weight", &[1024, 1024], Attention),
    ("bloom", "h.0.mlp.dense_4h_to_h.weight", &[1024, 4096], Mlp),
    ("deepseek", "model.layers.0.self_attn.q_a_proj.weight", &[1536, 7168], Attention),
    ("deepseek", "model.layers.0.self_attn.q_a_layernorm.weight", &[1536], Small),
    ("deepseek", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", &[576, 7168], Attention),
    ("deepseek", "model.layers.0.self_attn.kv_b_proj.weight", &[32768, 512], Attention),
    ("deepseek", "model.layers.0.self_attn.kv_b_proj.weight_scale_inv", &[256, 4], Small),
    ("deepseek", "model.layers.0.mlp.down_proj.weight_scale_inv", &[56, 144], Small),
    ("deepseek", "model.layers.3.mlp.gate.weight", &[256, 7168], Router),
    ("deepseek", "model.layers.3.mlp.gate.e_score_correction_bias", &[256], Small),
    ("deepseek", "model.layers.3.mlp.shared_experts.down_proj.weight", &[7168, 2048], Mlp),
    ("deepseek", "model.layers.61.eh_proj.weight", &[7168, 14336], Linear),
    ("deepseek", "model.layers.61.shared_head.head.weight", &[129280, 7168], Head),
    ("fp8", "model.layers.0.self_attn.q_proj.input_scale", &[1], Small),
    ("fp8", "model.layers.0.self_attn.q_proj.weight_scale", &[4096, 1], Small),
    ("granite moe", "model.layers.0.block_sparse_moe.input_linear.weight", &[32, 1024, 1024], Mlp),
    ("granite moe", "model.layers.0.block_sparse_moe.router.layer.weight", &[32, 1024], Router),
    ("switch", "encoder.block.1.layer.1.mlp.router.classifier.weight", &[8, 768], Router),
    ("t5", "shared.weight", &[32128, 512], Embedding),
    ("t5", "encoder.block.0.layer.0.SelfAttention.q.weight", &[512, 512], Attention),
    ("t5", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", &[1024, 512], Mlp),
    ("bert", "bert.embeddings.token_type_embeddings.weight", &[2, 768], Embedding),
    ("bert", "bert.encoder.layer.0.attention.self.query.weight", &[768, 768], Attention),
    ("bert", "bert.encoder.layer.0.attention.output.dense.weight", &[768, 768], Attention),
    ("bert", "bert.encoder.layer.0.attention.output.LayerNorm.weight", &[768], Small),
    ("bert", "bert.encoder.layer.0.intermediate.dense.weight", &[3072, 768], Mlp),
    ("bert", "bert.encoder.layer.0.output.dense.weight", &[768, 3072], Mlp),
    ("mamba", "backbone.embeddings.weight", &[50280, 768], Embedding),
    ("mamba", "backbone.layers.0.mixer.A_log", &[1536, 16], Small),
    ("mamba", "backbone.layers.0.mixer.in_proj.weight", &[3072, 768], Linear),
    ("mamba", "backbone.layers.0.mixer.conv1d.weight", &[1536, 1, 4], Other),
    ("rwkv", "rwkv.blocks.0.attention.gate.weight", &[2048, 2048], Attention),
    ("flux", "transformer_blocks.0.norm1.linear.weight", &[18432, 3072], Linear),
    ("an array", "hidden", &[512, 784], Linear),
    ("a lora", "base_model.model.layers.0.self_attn.q_proj.lora_A.weight", &[16, 4096], Attention),
    ("a classifier", "score.weight", &[3, 4096], Head),
];

#[test]
fn every_known_name_has_its_role() {
    let wrong: Vec<_> = NAMES
        .iter()
        .map(|&(family, name, shape, want)| (family, name, want, Role::of(&info(name, shape))))
        .filter(|(_, _, want, got)| want != got)
        .collect();
    assert!(wrong.is_empty(), "(family, name, expected, found): {wrong:#?}");
}

#[test]
fn integers_are_never_rounded() {
    let mask = TensorInfo::new("model.layers.0.self_attn.q_proj.qweight", DType::I32, vec![512, 4096]).unwrap();
    assert_eq!(Role::of(&mask), NotFloat);
    let recipe = recipe().all(true).rule("*", codec("int8_sym_v1")).unwrap();
    let choice = recipe.choose(&mask, 4096);
    assert_eq!((choice.codec.id, choice.reason), ("raw_v1", Reason::NotFloat(DType::I32)));
}

#[test]
fn a_matrix_below_1024_elements_is_small() {
    assert_eq!(Role::of(&info("h.0.mlp.c_fc.weight", &[33, 31])), Small);
    assert_eq!(Role::of(&info("h.0.mlp.c_fc.weight", &[32, 32])), Mlp);
    assert_eq!(Role::of(&info("scalar", &[])), Small);
    assert_eq!(Role::of(&info("h.0.mlp.c_fc.weight", &[0, 4096])), Small);
}

#[test]
fn every_role_has_its_default() {
    for (name, shape, want) in [
        ("model.layers.0.self_attn.q_proj.weight", &[64, 64][..], "int4_g16_fp16_v1"),
        ("model.layers.0.mlp.up_proj.weight", &[64, 64], "int4_g16_fp16_v1"),
        ("projection.weight", &[64, 64], "int4_g16_fp16_v1"),
        ("model.embed_tokens.weight", &[64, 64], "int8_sym_v1"),
        ("lm_head.weight", &[64, 64], "int8_sym_v1"),
        ("model.layers.0.mlp.gate.weight", &[64, 64], "raw_v1"),
        ("model.norm.weight", &[4096], "raw_v1"),
        ("conv.weight", &[64, 3, 16, 16], "raw_v1"),
    ] {
        let choice = choose(&recipe(), name, shape);
        assert_eq!((choice.codec.id, choice.reason), (want, Reason::Role(Role::of(&info(name, shape)))), "{name}");
    }
}

#[test]
fn each_step_of_the_precedence_overrides_the_next() {
    let name = "model.layers.0.mlp.down_proj.weight";
    let decided = |recipe: &Recipe| {
        let choice = choose(recipe, name, &[256, 256]);
        (choice.codec.id, choice.reason)
    };
    let mut recipe = recipe().role(Role::Mlp, codec("int4_g32_fp16_v1")).unwrap();
    assert_eq!(decided(&recipe), ("int4_g32_fp16_v1", Reason::Role(Mlp)));
    recipe = recipe.all(true);
    assert_eq!(decided(&recipe), ("int4_g16_fp16_v1", Reason::All));
    recipe = recipe.rule("*.down_proj.*", codec("int8_sym_v1")).unwrap().rule("*", codec("int4_g8_v1")).unwrap();
    assert_eq!(decided(&recipe), ("int8_sym_v1", Reason::Rule { index: 0, pattern: "*.down_proj.*".into() }));
    recipe = recipe.include("*.up_proj.*").unwrap();
    assert_eq!(decided(&recipe), ("raw_v1", Reason::NotIncluded));
    recipe = recipe.exclude("model.*").unwrap();
    assert_eq!(decided(&recipe), ("raw_v1", Reason::Excluded { pattern: "model.*".into() }));
}

#[test]
fn being_included_is_permission_and_not_an_order() {
    let recipe = recipe().include("*.q_proj.weight").unwrap().include("*norm*").unwrap();
    assert_eq!(id(&recipe, "model.layers.0.self_attn.q_proj.weight"), "int4_g16_fp16_v1");
    assert_eq!(id(&recipe, "model.layers.0.self_attn.k_proj.weight"), "raw_v1");
    assert_eq!(choose(&recipe, "model.norm.weight", &[4096]).reason, Reason::Role(Small));
}

#[test]
fn all_reaches_every_float_tensor() {
    let recipe = recipe().all(true);
    for (name, shape) in
        [("model.norm.weight", &[4096][..]), ("lm_head.weight", &[64, 64]), ("conv.weight", &[64, 3, 16, 16])]
    {
        assert_eq!(choose(&recipe, name, shape).codec.id, "int4_g16_fp16_v1", "{name}");
    }
    assert_eq!(choose(&recipe, "scale", &[]).codec.id, "int8_sym_v1");
}

#[test]
fn rows_shorter_than_the_group_fall_back_and_say_so() {
    for codec in codecs::all() {
        let group = codec.grouped().map_or(0, |layout| layout.group() as u64);
        let info = info("projection.weight", &[4096, 4096]);
        for recipe in [Recipe::new(codec), recipe().rule("*", codec).unwrap(), Recipe::new(codec).all(true)] {
            let exact = recipe.choose(&info, group);
            assert_eq!(exact.codec, codec);
            assert!(!matches!(exact.reason, Reason::ShortRows { .. }), "{exact:?}");
            if group >= 256 {
                // As good as a row, which is then the group.
                assert_eq!(recipe.choose(&info, group - 1), exact);
            } else if group > 0 {
                let short = recipe.choose(&info, group - 1);
                assert_eq!(short.codec.id, codecs::INT8_ROW);
                let want = format!("rows of {} are shorter than the group of {group} of {}", group - 1, codec.id);
                assert_eq!(short.reason.to_string(), want);
            }
        }
    }
}

#[test]
fn the_columns_of_the_matrix_count_and_not_the_last_dimension() {
    let info = info("h.0.mlp.c_fc.weight", &[8, 768]);
    assert_eq!(recipe().choose(&info, 768).codec.id, "int4_g16_fp16_v1");
    assert_eq!(recipe().choose(&info, 8).codec.id, "int8_sym_v1");
}

#[test]
fn globs_match_the_whole_name_across_dots_and_slashes() {
    let matches = |pattern: &str, name: &str| id(&recipe().exclude(pattern).unwrap(), name) == "raw_v1";
    assert!(matches("*.weight", "a.b/c.weight"));
    assert!(matches("model.*.q_proj.*", "model.layers.0.self_attn.q_proj.weight"));
    assert!(!matches("q_proj", "model.layers.0.self_attn.q_proj.weight"));
    assert!(!matches("model.layers.1.*", "model.layers.10.q_proj.weight"));
    assert!(matches("*.{q,k}_proj.weight", "x.k_proj.weight"));
    assert!(matches("layers.[0-3].*", "layers.2.w"));
    assert!(matches(r"a\*", "a*") && !matches(r"a\*", "ab"));
}

#[test]
fn regular_expressions_are_anchored_at_the_start_only() {
    let matches = |pattern: &str, name: &str| id(&recipe().exclude(pattern).unwrap(), name) == "raw_v1";
    assert!(matches("re:model", "model.x.weight"));
    assert!(!matches("re:x", "model.x.weight"));
    assert!(matches("re:.*x", "model.x.weight"));
    assert!(!matches("re:.*x$", "model.x.weight"));
    assert!(matches("re:(?x) x | model # either", "model.x.weight"));
    assert!(matches("re:odel|model", "model.x.weight"));
}

#[test]
fn a_recipe_reads_as_documented() {
    let text = r#"
        codec = "int4_g32_fp16_v1"
        all = false
        include = ["*"]
        exclude = ["re:.*vision.*"]
        [roles]
        attention = "int4_g16_fp16_v1"
        [[rule]]
        match = "*.down_proj.weight"
        codec = "int8_sym_v1"
    "#;
    let built = Recipe::new(codec("int4_g32_fp16_v1"))
        .include("*")
        .and_then(|r| r.exclude("re:.*vision.*"))
        .and_then(|r| r.role(Role::Attention, codec("int4_g16_fp16_v1")))
        .and_then(|r| r.rule("*.down_proj.weight", codec("int8_sym_v1")))
        .unwrap();
    assert_eq!(Recipe::from_toml(text).unwrap(), built);
}

#[test]
fn the_text_of_a_recipe_is_complete_and_pinned() {
    let recipe = recipe().include("*").unwrap().exclude(r#"re:.*"\d"#).unwrap().rule("é", codec("raw_v1")).unwrap();
    let text = r#"codec = "int4_g16_fp16_v1"
all = false
include = ["*"]
exclude = ["re:.*\"\\d"]

[roles]
attention = "int4_g16_fp16_v1"
mlp = "int4_g16_fp16_v1"
linear = "int4_g16_fp16_v1"
router = "raw_v1"
embedding = "int8_sym_v1"
head = "int8_sym_v1"

[[rule]]
match = "é"
codec = "raw_v1"
"#;
    assert_eq!(recipe.to_toml(), text);
    assert_eq!(Recipe::from_toml(text).unwrap(), recipe);
}

#[test]
fn embeddings_and_heads_get_more_bits_of_a_codec_of_any_rate() {
    let rate = |recipe: &Recipe, name: &str| choose(recipe, name, &[512, 512]).rate.map(Rate::bits);
    let recipe = Recipe::new(codec("ecu_v1")).target_bits(Rate::from_bits(4.25).unwrap());
    assert_eq!(rate(&recipe, "model.embed_tokens.weight"), Some(5.25));
    assert_eq!(rate(&recipe, "lm_head.weight"), Some(5.25));
    assert_eq!(rate(&recipe, "model.layers.0.mlp.up_proj.weight"), Some(4.25));
    let most = recipe.clone().target_bits(Rate::MOST);
    assert_eq!(rate(&most, "lm_head.weight"), Some(8.0));
    // Said by the recipe's text, and as a role of one's own.
    let text = recipe.to_toml();
    assert!(text.contains("head = { codec = \"ecu_v1\", more_bits = 1 }\n"), "{text}");
    assert_eq!(Recipe::from_toml(&text).unwrap(), recipe);
    let own = Recipe::from_toml("codec = \"ecu_v1\"\nroles.mlp = { codec = \"ecu_v1\", more_bits = 0.25 }").unwrap();
    assert_eq!(rate(&own, "model.layers.0.mlp.up_proj.weight"), Some(4.75));
    // A role without it has the recipe's rate, a rule with a rate has that.
    let plain = recipe.clone().role(Role::Head, codec("ecu_v1")).unwrap();
    assert_eq!(rate(&plain, "lm_head.weight"), Some(4.25));
    let rule =
        Recipe::from_toml(&format!("{text}\n[[rule]]\nmatch = \"lm_head*\"\ncodec = \"ecu_v1\"\ntarget_bits = 3\n"));
    assert_eq!(rate(&rule.unwrap(), "lm_head.weight"), Some(3.0));

    let with = |value: &str| refusal(&format!("codec = \"ecu_v1\"\nroles.head = {value}"));
    assert_eq!(with("{ more_bits = 1 }").split(',').next(), Some("recipe key 'roles.head.codec' is missing"));
    assert!(with("{ codec = \"int8_sym_v1\", more_bits = 1 }").contains("'roles.head.more_bits' has no effect"));
    assert!(with("{ codec = \"ecu_v1\", more_bits = -1 }").ends_with("'roles.head.more_bits' is -1, expected 0 to 8"));
    assert!(with("{ codec = \"ecu_v1\", bits = 1 }").starts_with("unknown recipe key 'roles.head.bits'"));
    assert!(with("1").contains("'roles.head' is of type integer"));
}

#[test]
fn a_bad_recipe_is_refused_by_naming_the_key_and_the_remedy() {
    let with = |rest: &str| refusal(&format!("codec = \"int8_sym_v1\"\n{rest}"));
    assert_eq!(refusal("all = true"), "recipe key 'codec' is missing, set it to a codec id such as 'int4_g16_fp16_v1'");
    assert_eq!(
        with("codecs = 1"),
        "unknown recipe key 'codecs', expected one of codec, target_bits, allocate, max_loss, all, include, exclude, roles, \
         rule, fit, outliers"
    );
    assert!(with("outliers = 1").contains("'outliers' is of type integer"));
    assert!(with("outliers = 0.5").contains("a share of 0.5 outliers, expected above 0 and at most 0.1"));
    assert_eq!(with("all = 1"), "recipe key 'all' is of type integer, expected true or false");
    assert_eq!(with("exclude = \"*\""), "recipe key 'exclude' is of type string, expected an array of patterns");
    assert_eq!(with("exclude = [1]"), "recipe key 'exclude' is of type integer, expected an array of patterns");
    assert_eq!(
        with("include = []"),
        "recipe key 'include' is empty, which would keep every tensor raw; remove it to include everything"
    );
    assert_eq!(
        with("include = [\"\"]"),
        "recipe key 'include': empty pattern, expected a glob such as '*.down_proj.weight' or 're:' and a regular expression"
    );
    assert_eq!(
        with("roles.atention = \"raw_v1\""),
        "recipe key 'roles': unknown role 'atention', expected one of attention, mlp, linear, router, embedding, head, \
         small, other, not_float"
    );
    assert_eq!(
        with("roles.small = \"int8_sym_v1\""),
        "recipe key 'roles': role 'small' takes no codec, expected one of attention, mlp, linear, router, embedding, \
         head; write a rule for its tensors instead"
    );
    assert_eq!(with("[[rule]]\ncodec = \"raw_v1\"").split(',').next(), Some("recipe key 'rule 1: match' is missing"));
    assert!(
        with("[[rule]]\nmatch = \"*\"\ncodec = \"q4\"").starts_with("recipe key 'rule 1: codec': unknown codec 'q4'")
    );
    assert!(with("[rule]\nmatch = \"*\"").contains("each under [[rule]]"));
    assert!(
        with("[[rule]]\nmatches = \"*\"").starts_with("unknown recipe key 'rule 1: matches', expected one of match")
    );
    assert!(with("exclude = [\"re:(\"]").contains("'re:(' is not a regular expression: unclosed group"));
    assert!(with("exclude = [\"[a\"]").contains("'[a' is not a glob: unclosed character class"));
    assert_eq!(
        with("exclude = [\"a\\n\"]"),
        "recipe key 'exclude': pattern \"a\\n\" has the control character '\\n', remove it"
    );
    assert!(with("all = ").starts_with("the recipe is not TOML: line 2: "));
    assert!(matches!(Recipe::from_toml("codec = \"q4\"").unwrap_err(), Error::Unsupported(_)));
}

/// Names that collide with the patterns below, and others.
fn any_name() -> impl Strategy<Value = String> {
    prop_oneof![
        proptest::collection::vec(
            proptest::sample::select(vec![
                "model", "layers", "0", "attn", "mlp", "norm", "gate", "w1", "é", "weight", "lm_head"
            ]),
            1..5,
        )
        .prop_map(|segments| segments.join(".")),
        "[^\\p{Cc}]{1,20}",
    ]
}

fn any_pattern() -> impl Strategy<Value = String> {
    let fixed =
        vec!["*", "*.weight", "re:.*attn", "re:mo", "*{mlp,é}*", "?odel*", "re:\\w+\\.\"?", "[!m]*", "re:(?x) m # '"];
    prop_oneof![
        proptest::sample::select(fixed).prop_map(str::to_owned),
        any_name().prop_map(|name| format!("re:{}", regex::escape(&name))),
        any_name().prop_filter("well formed", |name| recipe().include(name).is_ok()),
    ]
}

fn any_codec() -> impl Strategy<Value = &'static Codec> {
    proptest::sample::select(codecs::all().iter().collect::<Vec<_>>())
}

prop_compose! {
    fn any_recipe()(
        codec in any_codec(),
        all: bool,
        include in proptest::collection::vec(any_pattern(), 0..3),
        exclude in proptest::collection::vec(any_pattern(), 0..2),
        roles in proptest::collection::vec((proptest::sample::select(Role::WITH_CODEC.to_vec()), any_codec()), 0..4),
        rules in proptest::collection::vec((any_pattern(), any_codec()), 0..4),
    ) -> Recipe {
        let mut recipe = Recipe::new(codec).all(all);
        for pattern in include { recipe = recipe.include(&pattern).unwrap(); }
        for pattern in exclude { recipe = recipe.exclude(&pattern).unwrap(); }
        for (role, codec) in roles { recipe = recipe.role(role, codec).unwrap(); }
        for (pattern, codec) in rules { recipe = recipe.rule(&pattern, codec).unwrap(); }
        recipe
    }
}

proptest! {
    #[test]
    fn the_text_of_a_recipe_makes_the_same_choices(
        recipe in any_recipe(),
        names in proptest::collection::vec(any_name(), 1..20),
        shape in proptest::collection::vec(0_u64..200, 0..4),
    ) {
        let text = recipe.to_toml();
        let again = Recipe::from_toml(&text).unwrap();
        prop_assert_eq!(&again, &recipe);
        prop_assert_eq!(again.to_toml(), text);
        for name in names {
            prop_assert_eq!(choose(&again, &name, &shape), choose(&recipe, &name, &shape));
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text: String) {
        let _ = Recipe::from_toml(&text);
    }
}
