import cProfile,pstats,sys,tempfile,time
from pathlib import Path
from tests.helpers.records import record_of
from slm_pl.report import compare
n=int(sys.argv[1]); d=Path(tempfile.mkdtemp()); ps=[]
for i in range(n):
    r=record_of(f"model {i}", perplexity=15+i%37+i/n, latency=1+i%11); p=d/str(i)/"results.json"; p.parent.mkdir(); r.save(p); ps.append(str(p))
import io,contextlib
t=time.time(); pr=cProfile.Profile(); pr.enable()
with contextlib.redirect_stdout(io.StringIO()): compare(ps,str(d/"c"))
pr.disable(); print(n,time.time()-t)
pstats.Stats(pr).sort_stats("cumulative").print_stats(45)
