"""The three trainings of the method (pretrain, learn groups, finetune) and the demo."""
