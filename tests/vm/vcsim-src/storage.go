package main

import (
	"fmt"
	"path"
	"sort"
	"strings"
	"sync"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// One lock for everything that this extension keeps beside the simulator's own state.
var mu sync.Mutex

// storage adds mount/unmount and attach/detach. The first field must be the simulator's own type.
type storage struct {
	simulator.HostStorageSystem
	self types.ManagedObjectReference
}

// extend makes the n-th datastore a VMFS on the n-th LUN, which every host sees.
func extend(naas, iqns []string) {
	hosts := simulator.Map.All("HostSystem")
	sort.Slice(hosts, func(a, b int) bool { return hosts[a].Reference().Value < hosts[b].Reference().Value })
	for i, ds := range datastores() {
		if i >= len(naas) {
			break
		}
		ds.Host = nil
		for _, h := range hosts {
			ds.Host = append(ds.Host, types.DatastoreHostMount{Key: h.Reference(), MountInfo: types.HostMountInfo{
				AccessMode: "readWrite", Mounted: types.NewBool(true), Accessible: types.NewBool(true)}})
		}
		ds.Info = &types.VmfsDatastoreInfo{
			DatastoreInfo: *ds.Info.GetDatastoreInfo(),
			Vmfs: &types.HostVmfsVolume{
				HostFileSystemVolume: types.HostFileSystemVolume{Type: "VMFS", Name: ds.Name, Capacity: 1 << 40},
				Uuid:                 fmt.Sprintf("5f0c0de0-%08x-0000-000000000000", i), MajorVersion: 6, Version: "6.82", BlockSizeMb: 1,
				Extent: []types.HostScsiDiskPartition{{DiskName: naas[i], Partition: 1}},
			},
		}
		ds.Summary.Type = "VMFS"
	}
	for i, e := range hosts {
		h := e.(*simulator.HostSystem)
		s := &storage{self: h.Self, HostStorageSystem: *simulator.Map.Get(*h.ConfigManager.StorageSystem).(*simulator.HostStorageSystem)}
		info := *s.StorageDeviceInfo
		info.ScsiLun = append([]types.BaseScsiLun{}, info.ScsiLun...)
		for _, id := range naas {
			info.ScsiLun = append(info.ScsiLun, &types.HostScsiDisk{
				ScsiLun: types.ScsiLun{
					HostDevice: types.HostDevice{DeviceName: "/vmfs/devices/disks/" + id, DeviceType: "disk"},
					Key:        "key-vim.host.ScsiDisk-" + id, Uuid: "02000000" + strings.TrimPrefix(id, "naa."), CanonicalName: id,
					LunType: "disk", Vendor: "STILLPNT", Model: "VIRTUAL DISK", OperationalState: []string{"ok"},
				},
				Capacity: types.HostDiskDimensionsLba{BlockSize: 512, Block: 2048}, DevicePath: "/vmfs/devices/disks/" + id,
			})
		}
		if i < len(iqns) {
			info.HostBusAdapter = append([]types.BaseHostHostBusAdapter{&types.HostInternetScsiHba{
				HostHostBusAdapter: types.HostHostBusAdapter{Key: "key-vim.host.InternetScsiHba-vmhba64", Device: "vmhba64", Status: "online"},
				IsSoftwareBased:    true, IScsiName: iqns[i],
			}}, info.HostBusAdapter...)
		}
		s.StorageDeviceInfo = &info
		simulator.Map.Put(s)
	}
	for _, vm := range machines() {
		vm.Guest.ToolsRunningStatus = "guestToolsRunning"
	}
}

func datastores() []*simulator.Datastore {
	found := []*simulator.Datastore{}
	for _, e := range simulator.Map.All("Datastore") {
		found = append(found, e.(*simulator.Datastore))
	}
	sort.Slice(found, func(a, b int) bool { return found[a].Name < found[b].Name })
	return found
}

func machines() []*simulator.VirtualMachine {
	found := []*simulator.VirtualMachine{}
	for _, e := range simulator.Map.All("VirtualMachine") {
		found = append(found, e.(*simulator.VirtualMachine))
	}
	sort.Slice(found, func(a, b int) bool { return found[a].Name < found[b].Name })
	return found
}

func vmfs(ds *simulator.Datastore) *types.HostVmfsVolume {
	if info, ok := ds.Info.(*types.VmfsDatastoreInfo); ok {
		return info.Vmfs
	}
	return nil
}

// mounted tells whether a host has a datastore mounted (its place in ds.Host, -1 when it does not know it).
func mounted(ds *simulator.Datastore, host types.ManagedObjectReference) (int, bool) {
	for i := range ds.Host {
		if ds.Host[i].Key == host {
			is := ds.Host[i].MountInfo.Mounted
			return i, is == nil || *is
		}
	}
	return -1, false
}

// lun finds a host's LUN by uuid or canonical name.
func (s *storage) lun(id string) *types.ScsiLun {
	for _, l := range s.StorageDeviceInfo.ScsiLun {
		if sl := l.GetScsiLun(); sl.Uuid == id || sl.CanonicalName == id {
			return sl
		}
	}
	return nil
}

func inUse(kind, name string) types.BaseMethodFault {
	return &types.ResourceInUse{Type: kind, Name: name}
}

func (s *storage) mount(uuid string, on bool) types.BaseMethodFault {
	mu.Lock()
	defer mu.Unlock()
	for _, ds := range datastores() {
		volume := vmfs(ds)
		if volume == nil || volume.Uuid != uuid {
			continue
		}
		at, is := mounted(ds, s.self)
		if at < 0 {
			return &types.NotFound{}
		}
		if is == on {
			return &types.InvalidState{}
		}
		if !on {
			// A volume cannot go while the host has a VM of it in its inventory.
			for _, vm := range machines() {
				if vm.Runtime.Host != nil && *vm.Runtime.Host == s.self && strings.HasPrefix(vm.Config.Files.VmPathName, "["+ds.Name+"]") {
					return inUse("VirtualMachine", vm.Name)
				}
			}
		} else if lun := s.lun(volume.Extent[0].DiskName); lun == nil || lun.OperationalState[0] != "ok" {
			return &types.NotFound{}
		}
		ds.Host[at].MountInfo.Mounted = types.NewBool(on)
		ds.Host[at].MountInfo.Accessible = types.NewBool(on)
		return nil
	}
	return &types.NotFound{}
}

func (s *storage) attach(uuid string, on bool) types.BaseMethodFault {
	mu.Lock()
	defer mu.Unlock()
	sl := s.lun(uuid)
	if sl == nil {
		return &types.NotFound{}
	}
	state := "off"
	if on {
		state = "ok"
	}
	if sl.OperationalState[0] == state {
		return &types.InvalidState{}
	}
	for _, ds := range datastores() {
		volume := vmfs(ds)
		if on || volume == nil || volume.Extent[0].DiskName != sl.CanonicalName {
			continue
		}
		if _, is := mounted(ds, s.self); is {
			return inUse("Datastore", ds.Name)
		}
	}
	sl.OperationalState = []string{state}
	return nil
}

func (s *storage) UnmountVmfsVolume(r *types.UnmountVmfsVolume) soap.HasFault {
	b := &methods.UnmountVmfsVolumeBody{Res: &types.UnmountVmfsVolumeResponse{}}
	if f := s.mount(r.VmfsUuid, false); f != nil {
		b.Res, b.Fault_ = nil, simulator.Fault("", f)
	}
	return b
}

func (s *storage) MountVmfsVolume(r *types.MountVmfsVolume) soap.HasFault {
	b := &methods.MountVmfsVolumeBody{Res: &types.MountVmfsVolumeResponse{}}
	if f := s.mount(r.VmfsUuid, true); f != nil {
		b.Res, b.Fault_ = nil, simulator.Fault("", f)
	}
	return b
}

func (s *storage) DetachScsiLun(r *types.DetachScsiLun) soap.HasFault {
	b := &methods.DetachScsiLunBody{Res: &types.DetachScsiLunResponse{}}
	if f := s.attach(r.LunUuid, false); f != nil {
		b.Res, b.Fault_ = nil, simulator.Fault("", f)
	}
	return b
}

func (s *storage) AttachScsiLun(r *types.AttachScsiLun) soap.HasFault {
	b := &methods.AttachScsiLunBody{Res: &types.AttachScsiLunResponse{}}
	if f := s.attach(r.LunUuid, true); f != nil {
		b.Res, b.Fault_ = nil, simulator.Fault("", f)
	}
	return b
}

// usable tells whether a host can read a path of a datastore: a VM cannot be registered from a volume that is not there.
func usable(vmx string, host types.ManagedObjectReference) bool {
	mu.Lock()
	defer mu.Unlock()
	for _, ds := range datastores() {
		if strings.HasPrefix(vmx, "["+ds.Name+"]") {
			_, is := mounted(ds, host)
			return is
		}
	}
	return false
}

// directory of a datastore on this machine, where its files are.
func directory(ds *simulator.Datastore) string {
	return path.Clean(ds.Info.GetDatastoreInfo().Url)
}
