"""A tiny random BLIP that answers questions, in the layout of the published one."""

import torch

from tests.helpers.clip import SIDE
from tests.helpers.sd3 import _randomise

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no")


def save_blip_vqa(folder, seed=0):
    """A random BlipForQuestionAnswering with its processor and a tokenizer of letters; the last token is [ENC]."""
    from transformers import BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessorPil

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "?", "[DEC]", "[ENC]"]
    text = {"vocab_size": len(words), "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 2, "encoder_hidden_size": 24, "max_position_embeddings": 40, "pad_token_id": 0,
            "bos_token_id": len(words) - 2, "sep_token_id": 3, "eos_token_id": 3}  # fmt: skip
    vision = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": SIDE, "patch_size": 8}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))
        _randomise(model)
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return folder
