package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// controls is what a test sees and changes.
//
//	GET  /state              hosts, datastores, VMs, calls since the last reset
//	POST /reset              forget calls and rules
//	POST /rule               {"At": 3, "Method": "", "Kind": "fault"}
//	POST /vm?name=N&set=S    rdm | independent | busshare | passthrough | ft | spread | notools | off | on
//	POST /file?ds=N&path=P   a file on a datastore (a VM that is not in the inventory, the directory of vSphere HA)
func controls(f *front) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/state", func(w http.ResponseWriter, _ *http.Request) { answer(w, f.state()) })
	mux.HandleFunc("/reset", func(w http.ResponseWriter, _ *http.Request) {
		f.mu.Lock()
		f.calls, f.rules = nil, nil
		f.mu.Unlock()
		answer(w, true)
	})
	mux.HandleFunc("/rule", func(w http.ResponseWriter, r *http.Request) {
		var one rule
		if err := json.NewDecoder(r.Body).Decode(&one); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		f.mu.Lock()
		f.rules = append(f.rules, one)
		f.mu.Unlock()
		answer(w, true)
	})
	mux.HandleFunc("/vm", func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Query()
		for _, vm := range machines() {
			if vm.Name == query.Get("name") && change(vm, query.Get("set")) {
				answer(w, true)
				return
			}
		}
		http.Error(w, "no such VM, or no such change", http.StatusBadRequest)
	})
	mux.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Query()
		for _, ds := range datastores() {
			if ds.Name != query.Get("ds") {
				continue
			}
			path := filepath.Join(directory(ds), filepath.Clean("/"+query.Get("path")))
			err := os.MkdirAll(filepath.Dir(path), 0o700)
			if err == nil {
				err = os.WriteFile(path, nil, 0o600)
			}
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			answer(w, true)
			return
		}
		http.Error(w, "no such datastore", http.StatusBadRequest)
	})
	return mux
}

func answer(w http.ResponseWriter, value interface{}) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(value); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

func (f *front) state() interface{} {
	type host struct {
		Name      string            `json:"name"`
		Ref       string            `json:"ref"`
		Luns      map[string]string `json:"luns"`
		Mounted   []string          `json:"mounted"`
		InventVms []string          `json:"vms"`
	}
	type vm struct {
		Name      string   `json:"name"`
		Ref       string   `json:"ref"`
		Host      string   `json:"host"`
		Pool      string   `json:"pool"`
		Folder    string   `json:"folder"`
		Vmx       string   `json:"vmx"`
		Power     string   `json:"power"`
		Snapshots []string `json:"snapshots"`
	}
	hosts, vms := []host{}, []vm{}
	mu.Lock()
	defer mu.Unlock()
	for _, e := range simulator.Map.All("HostSystem") {
		h := e.(*simulator.HostSystem)
		one := host{Name: h.Name, Ref: h.Self.Value, Luns: map[string]string{}, Mounted: []string{}, InventVms: []string{}}
		if s, ok := simulator.Map.Get(*h.ConfigManager.StorageSystem).(*storage); ok {
			for _, l := range s.StorageDeviceInfo.ScsiLun {
				if sl := l.GetScsiLun(); sl.Vendor == "STILLPNT" {
					one.Luns[sl.CanonicalName] = sl.OperationalState[0]
				}
			}
		}
		for _, ds := range datastores() {
			if _, is := mounted(ds, h.Self); is {
				one.Mounted = append(one.Mounted, ds.Name)
			}
		}
		hosts = append(hosts, one)
	}
	for _, m := range machines() {
		one := vm{Name: m.Name, Ref: m.Self.Value, Vmx: m.Config.Files.VmPathName, Power: string(m.Runtime.PowerState), Snapshots: snapshots(m)}
		if m.Runtime.Host != nil {
			one.Host = m.Runtime.Host.Value
		}
		if m.ResourcePool != nil {
			one.Pool = m.ResourcePool.Value
		}
		if m.Parent != nil {
			one.Folder = m.Parent.Value
		}
		vms = append(vms, one)
	}
	sort.Slice(hosts, func(a, b int) bool { return hosts[a].Ref < hosts[b].Ref })
	f.mu.Lock()
	defer f.mu.Unlock()
	return map[string]interface{}{"hosts": hosts, "vms": vms, "calls": f.calls}
}

// change makes a VM one that a snapshot or revert has to treat apart.
func change(vm *simulator.VirtualMachine, what string) bool {
	mu.Lock()
	defer mu.Unlock()
	disk := func(change func(*types.VirtualDisk, *types.VirtualDiskFlatVer2BackingInfo)) {
		for _, d := range vm.Config.Hardware.Device {
			if disk, ok := d.(*types.VirtualDisk); ok {
				if backing, ok := disk.Backing.(*types.VirtualDiskFlatVer2BackingInfo); ok {
					change(disk, backing)
				}
			}
		}
	}
	switch what {
	case "rdm":
		disk(func(d *types.VirtualDisk, b *types.VirtualDiskFlatVer2BackingInfo) {
			d.Backing = &types.VirtualDiskRawDiskMappingVer1BackingInfo{
				VirtualDeviceFileBackingInfo: b.VirtualDeviceFileBackingInfo, CompatibilityMode: "physicalMode", DiskMode: "independent_persistent"}
		})
	case "independent":
		disk(func(_ *types.VirtualDisk, b *types.VirtualDiskFlatVer2BackingInfo) { b.DiskMode = "independent_persistent" })
	case "spread":
		disk(func(_ *types.VirtualDisk, b *types.VirtualDiskFlatVer2BackingInfo) {
			b.FileName = strings.Replace(b.FileName, "[LocalDS_0]", "[LocalDS_1]", 1)
		})
	case "busshare":
		for _, d := range vm.Config.Hardware.Device {
			if controller, ok := d.(types.BaseVirtualSCSIController); ok {
				controller.GetVirtualSCSIController().SharedBus = "physicalSharing"
			}
		}
	case "passthrough":
		vm.Config.Hardware.Device = append(vm.Config.Hardware.Device, &types.VirtualPCIPassthrough{VirtualDevice: types.VirtualDevice{Key: 13000}})
	case "ft":
		vm.Config.FtInfo = &types.FaultToleranceConfigInfo{Role: 1}
	case "notools":
		vm.Guest.ToolsRunningStatus = "guestToolsNotRunning"
	case "off":
		vm.Runtime.PowerState = types.VirtualMachinePowerStatePoweredOff
		vm.Summary.Runtime.PowerState = vm.Runtime.PowerState
	case "on":
		vm.Runtime.PowerState = types.VirtualMachinePowerStatePoweredOn
		vm.Summary.Runtime.PowerState = vm.Runtime.PowerState
	default:
		return false
	}
	return true
}
