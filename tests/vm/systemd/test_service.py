"""probe"""
import subprocess
def test_x():
    for c in ("systemctl status softirq-stalld systemd-sysusers", "systemctl list-units --all", "journalctl -b --no-pager", "systemd-analyze blame", "systemd-analyze critical-chain","mount","id softirq-stalld", "ls -la / /mnt /run", "sleep 40", "systemctl status softirq-stalld -l", "journalctl -u softirq-stalld -o json --no-pager", "softirq-stalld tail --json -n 2 & sleep 10"):
        print("####",c,flush=True)
        r=subprocess.run(c,shell=True,text=True,stdout=subprocess.PIPE,stderr=subprocess.STDOUT)
        print(r.stdout[-20000:],flush=True)
    assert 0
