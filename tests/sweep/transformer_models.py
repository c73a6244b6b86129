"""Architectures of transformers, each tiny and with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from subject import Subject, Trained

BATCH, LENGTH, IMAGE = 2, 16, 32

# Set where the configuration has such an entry; the names are those of many models.
SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "dim": 32,
    "embedding_size": 32,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dim": 64,
    "d_ff": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "head_dim": 8,
    "d_kv": 8,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_labels": 5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Architecture:
    """A model type, what it is asked to learn, and entries of its configuration."""

    type: str
    head: str
    batch: Callable[[Any], dict[str, Any]]
    entries: dict[str, Any] = field(default_factory=dict)
    representative: bool = False


def _tokens(config: Any) -> torch.Tensor:
    return torch.randint(3, config.get_text_config().vocab_size, (BATCH, LENGTH))


def _text(config: Any) -> dict[str, Any]:
    return {"input_ids": _tokens(config), "attention_mask": torch.ones(BATCH, LENGTH).long()}


def _labelled_text(config: Any) -> dict[str, Any]:
    tokens = _tokens(config)
    return {"input_ids": tokens, "labels": tokens}


def _pair(config: Any) -> dict[str, Any]:
    return {"input_ids": _tokens(config), "labels": _tokens(config)}


def _image(config: Any) -> dict[str, Any]:
    channels = getattr(config, "num_channels", 3)
    return {"pixel_values": torch.randn(BATCH, channels, IMAGE, IMAGE)}


def _image_and_text(config: Any) -> dict[str, Any]:
    return {**_text(config), "pixel_values": torch.randn(BATCH, 3, IMAGE, IMAGE)}


def _sound(config: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 1600)}


def _spectrogram(config: Any) -> dict[str, Any]:
    return {
        "input_features": torch.randn(BATCH, config.num_mel_bins, 2 * LENGTH),
        "labels": _tokens(config),
    }


def _filter_banks(config: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, config.max_length, config.num_mel_bins)}


def _series(config: Any) -> dict[str, Any]:
    return {
        "past_values": torch.randn(BATCH, config.context_length, 1),
        "future_values": torch.randn(BATCH, config.prediction_length, 1),
    }


Masked = partial(Architecture, head="MaskedLM", batch=_labelled_text)
Causal = partial(Architecture, head="CausalLM", batch=_labelled_text)
Pair = partial(Architecture, head="Seq2SeqLM", batch=_pair)
Image = partial(Architecture, head="ImageClassification", batch=_image)
_STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32], "out_features": None}
_SOUND = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 5),
    "conv_stride": (5, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "mask_time_prob": 0.0,
}
_TOWERS = {
    name: {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        **more,
    }
    for name, more in {
        "text_config": {"vocab_size": 99, "max_position_embeddings": 32, "eos_token_id": 2},
        "vision_config": {"image_size": IMAGE, "patch_size": 8},
    }.items()
}

ARCHITECTURES = [
    # encoders
    Masked("bert", representative=True),
    Masked("roberta"),
    Masked("distilbert"),
    Masked("albert"),
    Masked("electra"),
    Masked("mpnet"),
    Masked("modernbert"),
    Masked("deberta-v2"),
    Masked("convbert", entries={"conv_kernel_size": 3}),
    Masked("fnet"),
    Masked("roformer"),
    Masked("nystromformer", entries={"num_landmarks": 4, "segment_means_seq_len": LENGTH}),
    Masked("squeezebert"),
    Masked("esm", entries={"position_embedding_type": "rotary", "mask_token_id": 4}),
    Masked("longformer", entries={"attention_window": 8}),
    Masked("big_bird", entries={"attention_type": "original_full"}),
    Architecture(
        "funnel", "FunnelModel", _text, {"block_sizes": [1, 1], "d_head": 8, "d_inner": 64}
    ),
    # decoders
    Causal("gpt2", representative=True),
    Causal("gpt_neo", entries={"attention_types": [[["global", "local"], 1]]}),
    Causal("gpt_neox"),
    Causal("gptj", entries={"rotary_dim": 4}),
    Causal("codegen", entries={"rotary_dim": 4}),
    Causal("opt", entries={"ffn_dim": 64, "word_embed_proj_dim": 32}),
    Causal("bloom"),
    Causal("mpt"),
    Causal("falcon"),
    Causal("llama", representative=True),
    Causal("mistral"),
    Causal("gemma"),
    Causal("gemma2"),
    Causal("qwen2"),
    Causal("qwen3"),
    Causal("phi"),
    Causal("stablelm"),
    Causal("olmo2"),
    Causal("cohere"),
    Causal("starcoder2"),
    Causal("ctrl", entries={"dff": 64}),
    Architecture("xlnet", "Model", _text, {"d_inner": 64, "d_head": 8}),
    # mixtures of experts
    Causal("mixtral", entries={"num_local_experts": 4}, representative=True),
    Causal("qwen2_moe", entries={"num_experts": 4, "moe_intermediate_size": 32}),
    Causal("olmoe", entries={"num_experts": 4, "num_experts_per_tok": 2}),
    Causal("granitemoe", entries={"num_local_experts": 4}),
    Causal("gpt_oss", entries={"num_local_experts": 4}),
    Causal(
        "deepseek_v3",
        entries={
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    Pair("switch_transformers", entries={"num_experts": 2, "num_sparse_encoder_layers": 1}),
    # state-space and recurrent
    Causal("mamba", entries={"state_size": 4, "time_step_rank": 4}, representative=True),
    Causal("mamba2", entries={"state_size": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8}),
    Causal("falcon_mamba", entries={"state_size": 4, "time_step_rank": 4}),
    Causal("rwkv"),
    Causal("recurrent_gemma", entries={"lru_width": 32, "block_types": ["recurrent", "attention"]}),
    Causal(
        "jamba",
        entries={
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    # encoder and decoder
    Pair("t5", representative=True),
    Pair("bart"),
    Pair("mbart"),
    Pair("pegasus"),
    Pair("marian"),
    Pair("m2m_100"),
    Pair("blenderbot"),
    Pair("longt5", entries={"local_radius": 4}),
    Pair("led", entries={"attention_window": 8}),
    Pair(
        "prophetnet",
        entries={
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
        },
    ),
    # vision
    Image("vit", representative=True),
    Architecture("deit", "DeiTForImageClassification", _image),
    Image("beit"),
    Image("dinov2"),
    Image(
        "swin",
        entries={
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "patch_size": 4,
        },
    ),
    Image(
        "swinv2",
        entries={
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "patch_size": 4,
        },
    ),
    Image("convnext", entries={**_STAGES, "patch_size": 4, "num_stages": 2}, representative=True),
    Image("convnextv2", entries={**_STAGES, "patch_size": 4, "num_stages": 2}),
    Image("resnet", entries={**_STAGES, "embedding_size": 16, "layer_type": "basic"}),
    Image("regnet", entries={**_STAGES, "embedding_size": 16, "groups_width": 8}),
    Image(
        "segformer",
        entries={
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    Image(
        "poolformer",
        entries={
            "depths": [1, 1],
            "hidden_sizes": [16, 32],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
            "num_encoder_blocks": 2,
        },
    ),
    Image(
        "mobilevit",
        entries={
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "patch_size": 2,
        },
    ),
    Image("mobilenet_v2"),
    Architecture(
        "levit",
        "LevitForImageClassification",
        _image,
        {
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "image_size": IMAGE,
            "patch_size": 16,
        },
    ),
    Image(
        "focalnet",
        entries={
            "embed_dim": 16,
            "depths": [1, 1],
            "focal_levels": [1, 1],
            "focal_windows": [3, 3],
            "patch_size": 4,
        },
    ),
    # audio
    Architecture("wav2vec2", "Model", _sound, _SOUND, representative=True),
    Architecture("hubert", "Model", _sound, _SOUND),
    Architecture("wavlm", "Model", _sound, _SOUND),
    Architecture("sew", "Model", _sound, {**_SOUND, "squeeze_factor": 2}),
    Architecture(
        "whisper",
        "SpeechSeq2Seq",
        _spectrogram,
        {
            "num_mel_bins": 8,
            "max_source_positions": LENGTH,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    Architecture(
        "audio-spectrogram-transformer",
        "AudioClassification",
        _filter_banks,
        {"max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
    ),
    # two towers, time series
    Architecture("clip", "Model", _image_and_text, {**_TOWERS, "projection_dim": 16}),
    Architecture("siglip", "Model", _image_and_text, _TOWERS),
    Architecture(
        "patchtst",
        "PatchTSTForPrediction",
        _series,
        {
            "context_length": 32,
            "prediction_length": 8,
            "patch_length": 8,
            "patch_stride": 8,
            "ffn_dim": 64,
        },
    ),
]


def subjects() -> list[Subject]:
    return [
        Subject(
            f"transformers:{a.type}",
            partial(_make, a),
            representative=a.representative,
            predict=a.representative,
        )
        for a in ARCHITECTURES
    ]


def _make(architecture: Architecture) -> Trained:
    default = transformers.AutoConfig.for_model(architecture.type)
    known = default.to_dict()
    small = {k: v for k, v in SMALL.items() if k in known or k == "num_labels"}
    config = transformers.AutoConfig.for_model(
        architecture.type, **{**small, **architecture.entries}
    )
    config.decoder_start_token_id = 1
    config.use_cache = False
    head = architecture.head
    made = getattr(transformers, head, None) or getattr(
        transformers, "AutoModel" if head == "Model" else f"AutoModelFor{head}"
    )
    model = made.from_config(config) if "Auto" in made.__name__ else made(config)
    return Trained(model.train(), kwargs=architecture.batch(config))
