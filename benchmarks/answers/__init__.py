"""What quantization does to precision, speed, storage, complexity, robustness, training and fusion, measured.

    python -m benchmarks.answers

Each section is a module with

    jobs(options)          name -> Job: what to compute, in any order, on all cores at once
    timed(found, options)  more results, of what is timed: alone, in this process' turn (where there is any)
    figures(found)         name -> Figures: the tables
    answer(figures)        the answer in words, with the figures in it

where `found` holds the results of all jobs by name. `docs/answers.json` keeps the figures, and nothing else;
`docs/answers.md` is written from it, between its marks.
"""
