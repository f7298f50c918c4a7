"""DynamicConv on IWSLT'14 German-English: fairseq's translation model, from text to BLEU."""
