"""The zoo: every problem that parity tests, machines and sanitizers are run through, one case string each.

A bug begins here, with a failing line. `tilefold case "<line>"` replays one. FORWARD is folded forward only, by each
machine: its gradient takes too long, or does not exist (a weight rebuilt from scores of 1e30 is 0 or infinite).
"""

ZOO = """
float32 h1 q1 k1 d1
float32 h3 q37 k53 d8 v5
float32 2d q64 k64 d16
float32 b2x3 h2 q17 k19 d8
float32 b2 h4/2 q130 k130 d64
float32 h8/1 q33 k65 d32
float32 h6/2 q300 k700 d16 causal
float32 h2 q700 k700 d64 causal
float32 h2 q300 k700 d64 causal=top-left
float32 h2 q70 k30 d8 causal
float32 h2 q70 k30 d8 causal=top-left
float32 h1 q600 k600 d8 window=40,0
float32 h1 q600 k600 d8 window=40,17
float32 h1 q300 k1100 d8 window=-,3
float32 h1 q50 k60 d8 window=0,0
float32 h1 q50 k60 d8 band=3,2,-5
float32 h1 q50 k60 d8 band=-7,20,4
float32 h1 q50 k60 d8 causal window=5,9
float32 h2 q40 k90 d8 prefix=21 causal
float32 h2 q90 k90 d8 chunked=16 causal
float32 h2 q600 k600 d8 anchors=4,90
float32 h2 q53 k53 d8 documents=11,30,12
float32 h2 q20 k53 d8 documents=11,30,12 causal
float32 h4/2 q40 k53 d8 dense=0.5
float32 b2 h2 q600 k700 d8 dense=0.02
float32 h2 q40 k53 d8 dense=0
float32 h4/2 q300 k700 d8 predicate=3
float32 h2 q300 k700 d8 predicate=3 causal window=200,0
float32 b3 h2 q40 k53 d8 kv_lengths=0,7,53
float32 b3 h2 q40 k53 d8 q_lengths=40,3,0 kv_lengths=53,7,9 causal
float32 b2 h4/2 q40 k53 d8 q_lengths=40,12 kv_lengths=53,30 window=5,2 alibi
float32 h4/2 d16 packed=3,0,9,30/5,2,0,41
float32 h4/2 d16 packed=3,0,9,30/5,2,0,41 causal sinks softcap=3
float32 h2 d16 packed=30,40/30,40 causal=top-left
float32 b2 h4/2 q15 k700 d8 tree=2
float32 h2 q300 k700 d8 tree=1 window=200,0 nan
float32 b2 h2 q40 k90 d8 q_lengths=40,11 kv_lengths=90,30 tree=3 alibi
float32 h2 q53 k30 d8 tree=3
float32 h2 q40 k53 d8 scale=0
float32 h2 q40 k53 d8 scale=-0.7
float32 h2 q40 k53 d8 softcap=2
float32 h4/2 q300 k530 d8 softcap=2 causal bias=1h1k sinks alibi
float32 b2 h4/2 q40 k53 d8 alibi=b causal
float32 b2 h4/2 q40 k53 d8 bias=bhqk
float32 b2 h4/2 q40 k53 d8 bias=11qk
float32 b2 h4/2 q40 k53 d8 bias=b11k
float32 b2 h4/2 q40 k53 d8 bias=1hq1 hide=0.4
float32 b2 h4/2 q40 k53 d8 bias=bhqk hide=0.97 sinks
float32 b2 h4/2 q300 k530 d8 bias=b11k hide=0.5 causal
float32 h4/2 q20 k53 d8 sinks
float32 h2 q70 k30 d8 causal sinks
float32 b2 h4/2 q130 k130 d16 order=bshd causal
float32 b2 h4/2 q130 k130 d16 order=fortran causal
float32 b2 h4/2 q130 k130 d16 order=reversed causal
float32 b2 h4/2 q130 k130 d16 order=strided causal
float32 h2 q60 k700 d16 logits=peaked
float32 h2 q60 k2000 d16 logits=rising
float32 h2 q60 k2000 d16 logits=falling
float32 h2 q60 k700 d16 logits=huge
float32 h2 q300 k700 d8 window=20,0 nan
float32 b2 h4/2 q300 k530 d8 kv_lengths=530,90 causal nan
float32 h2 q53 k53 d8 dense=0.02 nan
float32 h2 q1 k700 d64
float32 h32/8 q1 k1300 d32 causal
float32 h32/8 q5 k1300 d32 causal
float32 b0x2 h2 q5 k5 d4
float32 b0 h2 q5 k5 d4
float32 h2 q0 k5 d4
float32 h2 q0 k0 d4 nan
float32 h2 q5 k0 d4
float32 h2 q5 k0 d4 sinks causal
float32 h2 q5 k7 d0 v3
float32 h2 q5 k7 d4 v0
float64 b2 h4/2 q130 k130 d64
float64 h2 q300 k700 d32 causal softcap=5 bias=1h1k sinks
float64 h2 q300 k700 d32 window=90,4 alibi
float16 b2 h4/2 q130 k130 d64 causal
float16 h2 q300 k700 d32 softcap=5 sinks
float16 h2 q60 k700 d16 logits=huge
bfloat16 b2 h4/2 q130 k130 d64 causal
bfloat16 h2 q300 k700 d32 softcap=5 bias=1h1k sinks
bfloat16 h2 q300 k700 d32 window=90,4 order=bshd
float32 h2 q1 k2300 d64
float32 b2 h8/2 q3 k2100 d40 v24 causal
float32 h2 q3 k2100 d16 alibi causal sinks
float32 h4/1 q100 k1100 d16 documents=300,500,300 causal
float32 h2 q60 k2000 d16 anchors=4,900
float32 h5/1 q40 k53 d16 causal
float32 b9 h2 q130 k70 d16
float32 b2 h1 q3 k2100 d16 kv_lengths=0,0
float32 b2 h1 q3 k2100 d16 kv_lengths=0,0 q_lengths=0,2 sinks
float32 h4/1 q2 k1300 d16 window=20,0 nan
float32 h4/1 q2 k300 d16 predicate=3 nan
float32 h1 q1 k257 d1 softcap=20 seed=40
float64 h2 q5 k1500 d33
float64 h8/1 q3 k1100 d33 v17 causal bias=11qk hide=0.3
float64 h2 q53 k53 d8 dense=0.02 nan
float64 h3/1 q1 k1100 d16 window=20,0 nan
float64 h1/1 d64 v80 documents=3 q1 k3 logits=peaked seed=94
float64 h1/1 d64 v0 documents=5 q1 k5 logits=rising seed=93
float16 h5/1 q40 k1100 d24 causal
float16 h4/1 q2 k2300 d64 softcap=20
float16 b3x2 h4/2 q100 k200 d16 causal
float16 h2 q60 k1100 d16 predicate=3
float16 h4/2 d16 packed=100,1,60/5,200,70 causal
float16 h2 q90 k200 d16 window=20,0 nan order=strided
float16 h8/1 q1 k1100 d16 logits=rising
bfloat16 h7/1 q33 k300 d32 causal
bfloat16 h2 q50 k333 d33 v47 causal
bfloat16 h2/1 q3 k333 d33 v5
bfloat16 h1 q17 k31 d1 v1
bfloat16 h2 q50 k90 d8 order=reversed
bfloat16 h2 q50 k90 d32 order=strided
bfloat16 h2 q50 k90 d32 order=fortran causal
bfloat16 h4/1 q2 k2300 d64 causal window=1500,0
bfloat16 h4/1 q2 k2300 d64 alibi sinks
bfloat16 h4/2 q40 k153 d16 dense=0.3
bfloat16 h4/1 q7 k1300 d16 tree=2 nan
bfloat16 h8/1 q1 k700 d128
bfloat16 h7/1 q1 k333 d80 v48 nan
bfloat16 h3/1 q1 k61 d20 v100 order=strided
bfloat16 h4/1 q2 k300 d64 v96 order=fortran softcap=5
bfloat16 h4/2 q3 k1300 d96 order=bshd window=900,0
bfloat16 h2 q300 k300 d16 documents=101,90,109 causal
bfloat16 b2 h4/2 q300 k530 d8 bias=b11k hide=0.5 causal
bfloat16 b9 h2 q130 k70 d16
bfloat16 h4/2 d16 packed=100,1,60/5,200,71 causal
bfloat16 b2 h2 q60 k230 d8 kv_lengths=230,91 causal nan
bfloat16 h2 q90 k200 d16 window=20,0 nan
bfloat16 h4/1 q2 k1300 d16 window=21,0 nan
bfloat16 h2 q60 k700 d16 logits=peaked
bfloat16 h2 q60 k2000 d16 logits=falling
float32 h1 q2 k1030 d4 v4 scale=0 sinks
float16 h1 q2 k1030 d0 v0 scale=0 sinks
float16 h2 q1 k1 d0 v0 sinks seed=51
float16 h1 q1 k1030 d0 v0 scale=0 softcap=0.5 bias=bhq1
float16 h1 q2 k1030 d0 v0 scale=0 softcap=0.5 bias=bhq1
float32 h2 q300 k700 d4 scale=0 bias=1111
float32 h4/2 q130 k300 d4 scale=0 bias=1h11
""".strip().splitlines()

FORWARD = """
bfloat16 h2 q60 k700 d16 logits=huge
float32 h1 q20 k45 d1500
float64 h1 q20 k45 d1500
float16 h1 q20 k45 d1500
bfloat16 h1 q20 k45 d1024
bfloat16 h1 q20 k45 d1100 v1300
bfloat16 h1 q20 k1045 d40 v2100
bfloat16 h2/1 q70 k45 d2048 causal
bfloat16 h1 q20 k45 d4100
""".strip().splitlines()
