import torch, time, numpy as np, onnxruntime as ort, sys
from torch import nn
from tests.conftest import llama, SMALL
from infllm_pass.export import export, export_onnx
m=llama().float()
class W(nn.Module):
    def __init__(s,m): super().__init__(); s.m=m
    def forward(s,ids): return s.m(input_ids=ids,use_cache=False).logits
ds={"ids":{0:torch.export.Dim("b",min=1,max=8),1:torch.export.Dim("n",min=2,max=4096)}}
t=time.time()
p=export(W(m),(torch.randint(0,64,(2,50)),),dynamic_shapes=ds,config=SMALL)
print("export",time.time()-t)
print([str(n.target) for n in p.graph.nodes if "infllm" in str(n.target)], len(p.graph.nodes))
for op in (18,23):
    t=time.time()
    r=export_onnx(W(m),f"/tmp/h6_m{op}.onnx",(torch.randint(0,64,(2,50)),),dynamic_shapes=ds,config=SMALL,opset=op,overwrite=True)
    print("onnx",time.time()-t); 
    s=ort.InferenceSession(f"/tmp/h6_m{op}.onnx",providers=["CPUExecutionProvider"])
    for n in (20,63,64,200):
        ids=torch.randint(0,64,(2,n))
        y=torch.from_numpy(s.run(None,{s.get_inputs()[0].name:ids.numpy()})[0]); e=p.module()(ids); d=W(m)(ids)
        print(n,((y-e).norm()/e.norm()).item(),((d-e).norm()/e.norm()).item())
print(r)
