"""Small configurations of encoders and encoder-decoders, with odd sizes, in as many variants as one asks for."""

import random

ENCODERS = (
    "bert", "roberta", "electra", "distilbert", "albert", "deberta-v2", "mpnet", "modernbert", "bart", "whisper", "vit",
    "wav2vec2", "clip", "clip_text_model", "clip_vision_model", "mbart", "plbart", "pegasus", "marian", "m2m_100",
)  # fmt: skip
CLASSES = {
    "bert": "BertModel BertForMaskedLM BertForSequenceClassification BertForTokenClassification "
    "BertForQuestionAnswering BertForMultipleChoice BertForPreTraining BertForNextSentencePrediction BertLMHeadModel",
    "roberta": "RobertaModel RobertaForMaskedLM RobertaForSequenceClassification RobertaForTokenClassification "
    "RobertaForQuestionAnswering RobertaForMultipleChoice RobertaForCausalLM",
    "electra": "ElectraModel ElectraForMaskedLM ElectraForSequenceClassification ElectraForTokenClassification "
    "ElectraForQuestionAnswering ElectraForMultipleChoice ElectraForPreTraining ElectraForCausalLM",
    "distilbert": "DistilBertModel DistilBertForMaskedLM DistilBertForSequenceClassification "
    "DistilBertForTokenClassification DistilBertForQuestionAnswering DistilBertForMultipleChoice",
    "albert": "AlbertModel AlbertForMaskedLM AlbertForSequenceClassification AlbertForTokenClassification "
    "AlbertForQuestionAnswering AlbertForMultipleChoice AlbertForPreTraining",
    "deberta-v2": "DebertaV2Model DebertaV2ForMaskedLM DebertaV2ForSequenceClassification "
    "DebertaV2ForTokenClassification DebertaV2ForQuestionAnswering DebertaV2ForMultipleChoice",
    "mpnet": "MPNetModel MPNetForMaskedLM MPNetForSequenceClassification MPNetForTokenClassification "
    "MPNetForQuestionAnswering MPNetForMultipleChoice",
    "modernbert": "ModernBertModel ModernBertForMaskedLM ModernBertForSequenceClassification "
    "ModernBertForTokenClassification ModernBertForQuestionAnswering ModernBertForMultipleChoice",
    "bart": "BartModel BartForConditionalGeneration BartForSequenceClassification BartForQuestionAnswering "
    "BartForCausalLM",
    "mbart": "MBartModel MBartForConditionalGeneration MBartForSequenceClassification MBartForQuestionAnswering "
    "MBartForCausalLM",
    "plbart": "PLBartModel PLBartForConditionalGeneration PLBartForSequenceClassification PLBartForCausalLM",
    "pegasus": "PegasusModel PegasusForConditionalGeneration PegasusForCausalLM",
    "marian": "MarianModel MarianMTModel MarianForCausalLM",
    "m2m_100": "M2M100Model M2M100ForConditionalGeneration",
    "whisper": "WhisperModel WhisperForConditionalGeneration WhisperForAudioClassification WhisperForCausalLM",
    "vit": "ViTModel ViTForImageClassification ViTForMaskedImageModeling",
    "wav2vec2": "Wav2Vec2Model Wav2Vec2ForCTC Wav2Vec2ForSequenceClassification Wav2Vec2ForAudioFrameClassification "
    "Wav2Vec2ForPreTraining Wav2Vec2ForXVector",
    "clip": "CLIPModel CLIPForImageClassification",
    "clip_text_model": "CLIPTextModel CLIPTextModelWithProjection",
    "clip_vision_model": "CLIPVisionModel CLIPVisionModelWithProjection",
}
# The class that is counted without architectures
USUAL = {
    "mbart": "MBartForConditionalGeneration", "plbart": "PLBartForConditionalGeneration", "marian": "MarianMTModel",
    "pegasus": "PegasusForConditionalGeneration", "m2m_100": "M2M100ForConditionalGeneration",
    "bart": "BartForConditionalGeneration", "whisper": "WhisperForConditionalGeneration", "clip": "CLIPModel",
    "vit": "ViTForImageClassification", "clip_text_model": "CLIPTextModel", "clip_vision_model": "CLIPVisionModel",
}  # fmt: skip


def usual(family):
    """The class that is counted without architectures: for texts and sound, the classifier."""
    return USUAL.get(family) or next(n for n in CLASSES[family].split() if n.endswith("ForSequenceClassification"))


def variant(family, seed):
    """A small random configuration of a family."""
    pick = random.Random(f"{family}/{seed}")
    yes = lambda: pick.random() < 0.5  # noqa: E731

    def sizes():
        heads = pick.choice([2, 3, 4])
        return {
            "vocab_size": pick.randint(50, 99), "hidden_size": heads * pick.choice([4, 6]), "intermediate_size": 22,
            "num_hidden_layers": pick.choice([1, 2, 3]), "num_attention_heads": heads,
            "max_position_embeddings": pick.choice([20, 31]),
        }  # fmt: skip

    values = {"model_type": family, **sizes(), "num_labels": pick.choice([2, 5]), "tie_word_embeddings": yes()}
    values |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    hidden, heads = values["hidden_size"], values["num_attention_heads"]

    def without(*names):
        for name in names:
            del values[name]
        return {}

    def stacks():
        without("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        both = {}
        for stack in ("encoder", "decoder"):
            both |= {f"{stack}_layers": pick.choice([1, 2]), f"{stack}_ffn_dim": pick.choice([20, 26])}
            both |= {f"{stack}_attention_heads": heads}
        return {"d_model": hidden, **both, "decoder_start_token_id": 0}

    def picture():
        return {
            "image_size": pick.choice([32, 36, [32, 48]]), "patch_size": pick.choice([8, 16]),
            "num_channels": pick.choice([1, 3]),
        }  # fmt: skip

    def towers():
        texts, images = sizes(), {k: v for k, v in sizes().items() if "vocab" not in k and "position" not in k}
        images |= {"image_size": 32, "patch_size": 8, "num_channels": pick.choice([1, 3])}
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        return {"text_config": texts | ends, "vision_config": images, "projection_dim": 10}

    more = {
        "bert": lambda: {"type_vocab_size": pick.choice([1, 2, 3])},
        "roberta": lambda: {"type_vocab_size": pick.choice([1, 2])},
        "electra": lambda: {
            "embedding_size": pick.choice([8, hidden]), "type_vocab_size": pick.choice([1, 2]),
            "summary_use_proj": yes(),
        },
        "distilbert": lambda: without("hidden_size", "num_hidden_layers", "num_attention_heads") | {
            "dim": hidden, "hidden_dim": 26, "n_layers": pick.choice([1, 2]), "n_heads": heads,
            "sinusoidal_pos_embds": False,
        },
        "albert": lambda: {
            "embedding_size": pick.choice([7, 10]), "num_hidden_groups": pick.choice([1, 2]), "num_hidden_layers": 4,
            "inner_group_num": pick.choice([1, 2]), "type_vocab_size": pick.choice([1, 2]),
        },
        "deberta-v2": lambda: {
            "relative_attention": yes(), "pos_att_type": pick.choice(["c2p|p2c", ["p2c"], None]),
            "position_buckets": pick.choice([-1, 7]), "max_relative_positions": pick.choice([-1, 9]),
            "norm_rel_ebd": pick.choice(["layer_norm", "none"]), "share_att_key": yes(), "legacy": yes(),
            "position_biased_input": yes(), "type_vocab_size": pick.choice([0, 2]), "conv_kernel_size": 3 * yes(),
            "conv_groups": 2 if hidden % 2 == 0 else 1,
        },
        "mpnet": lambda: {"relative_attention_num_buckets": pick.choice([8, 32])},
        "modernbert": lambda: {
            "norm_bias": yes(), "attention_bias": yes(), "mlp_bias": yes(), "classifier_bias": yes(),
            "decoder_bias": yes(), "cls_token_id": 0, "sep_token_id": 0,
        },
        **dict.fromkeys(("bart", "mbart", "plbart", "pegasus", "marian", "m2m_100"), stacks),
        "whisper": lambda: stacks() | {
            "num_mel_bins": pick.choice([20, 80]), "max_source_positions": 30, "max_target_positions": 24,
            "use_weighted_layer_sum": yes(), "classifier_proj_size": 9, "begin_suppress_tokens": [0],
        },
        "vit": lambda: picture() | {
            "qkv_bias": yes(), "head_dim": pick.choice([4, 5]), "encoder_stride": 4,
            "pooler_output_size": pick.choice([None, 6]),
        },
        "wav2vec2": lambda: {
            "conv_dim": [6, 8, 10], "conv_kernel": [5, 3, 2], "conv_stride": [2, 2, 2], "conv_bias": yes(),
            "feat_extract_norm": pick.choice(["group", "layer"]), "num_conv_pos_embeddings": pick.choice([8, 6]),
            "num_conv_pos_embedding_groups": 2 if hidden % 2 == 0 else 1, "do_stable_layer_norm": yes(),
            "adapter_attn_dim": pick.choice([None, 5]), "use_weighted_layer_sum": yes(), "classifier_proj_size": 9,
            "mask_time_prob": pick.choice([0.0, 0.05]), "num_codevectors_per_group": 6, "codevector_dim": 8,
            "proj_codevector_dim": 6, "tdnn_dim": [8, 10], "tdnn_kernel": [3, 1], "tdnn_dilation": [1, 1],
            "xvector_output_dim": 7,
        },
        "clip": towers,
        "clip_text_model": lambda: {"projection_dim": 10},
        "clip_vision_model": lambda: {"image_size": 32, "patch_size": 8, "projection_dim": 10},
    }  # fmt: skip
    return values | more[family]()
