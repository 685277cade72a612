"""The few operations that make a training step fast, once per kind of device behind one interface.

base.py is the interface, reference.py the formulas in plain torch, cpu.py and triton.py are the fast ones, choose.py
picks one.
"""
