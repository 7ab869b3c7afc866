"""`trimtab doctor`: looks at the machine, judges what it finds, and says what to type.

facts.py is what is found, look.py finds it, judge.py decides what it means (pure), page.py shows it, gpu.py proves a GPU.
"""
