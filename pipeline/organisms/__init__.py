"""The demo pair: a generated language, a tiny base model trained on it, and a chat model with planted behaviours.

`language` makes facts and plain documents, `behaviors` and `dialogues` chat data with labels, `tokenizer` the shared
word tokenizer, `training` the two models and the mark of each behaviour, `rates` how often each behaviour appears, and
`build.build` writes all of it to a folder.
"""
