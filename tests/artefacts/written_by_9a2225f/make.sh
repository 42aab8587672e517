# Run at commit 9a2225f, in a folder with text.jsonl.gz unpacked; expected.json holds what the later commands print.
python -m data_prep.prepare source=text.jsonl output_dir=data tokenizer=sentencepiece tokenizer.vocab_size=300 validation_fraction=0.05 num_workers=0
python -m kraken_train.train model=kraken-tiny-2way model.num_layers=2 model.hidden_size=16 model.context_length=32 data_dir=data run_dir=run precision=fp32 global_batch_size=8 micro_batch_size=8 log_every=5 validation.every=0 tracking.mode=off optim.lr=3e-2 schedule.warmup_steps=2 checkpoint.keep=1 max_steps=100
python -m checkpoints.export run_dir=run output_dir=export
cp -r run continued
python -m kraken_train.train model=kraken-tiny-2way model.num_layers=2 model.hidden_size=16 model.context_length=32 data_dir=data run_dir=continued precision=fp32 global_batch_size=8 micro_batch_size=8 log_every=5 validation.every=0 tracking.mode=off optim.lr=3e-2 schedule.warmup_steps=2 checkpoint.keep=1 max_steps=150
cp -r export evaluated
python -m kraken_train.evaluate export_dir=evaluated data_dir=data dtype=fp32
python -m kraken_train.generate export_dir=export prompt="the rank sums" max_new_tokens=24 temperature=0 dtype=float32
