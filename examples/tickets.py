"""Tickets of a trained run: how good they are, and a folder of one that `transformers` opens. First: `train.py`."""

from twist_fl import TrainedRun

run = TrainedRun("runs/example")
for size in (8, 4):
    tickets = run.tickets(size, draws=3)
    print(f"{size}/12: {tickets.num_params:,} parameters, perplexities {[round(p, 1) for p in tickets.perplexities]}")

ticket = run.blueprint(size=4, draw=0)
print(f"heads of each layer: {ticket.attn}; perplexity {run.perplexity(ticket):.1f}")

tokenizer, model = run.tokenizer(), run.model(ticket)
tokens = model.generate(**tokenizer("The module", return_tensors="pt"), max_new_tokens=8, pad_token_id=0)
print("it writes:", tokenizer.decode(tokens[0]))

exported = run.export(ticket, "phone")
print("for AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True):", exported.folder)
print(f"{exported.num_bytes:,} bytes; checked in {exported.checked}")
