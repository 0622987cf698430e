package main

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"log"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// rule is what happens to a call instead of being served, once.
type rule struct {
	// At is the place of the call since the last reset, from 1; 0 is any.
	At int
	// Method is its name; empty is any.
	Method string
	// Kind: fault (refused, nothing done), drop (the connection ends, nothing done), lost (done, but the answer is lost),
	// hold (served after Delay).
	Kind string
	// Delay in milliseconds, for hold.
	Delay int
	// Times it may happen; 0 is once.
	Times int
}

// front stands before the simulator.
type front struct {
	service *simulator.Service
	content string
	mu      sync.Mutex
	calls   []string
	rules   []rule
	// What each VM's directory holds of snapshots: as it is, and as it was when the last LUN snapshot was cut.
	live, cut map[string][]string
}

func newFront(service *simulator.Service, content string) *front {
	return &front{service: service, content: content, live: map[string][]string{}, cut: map[string][]string{}}
}

var (
	methodOf = regexp.MustCompile(`<(?:\w+:)?Body[^>]*>\s*<(?:\w+:)?(\w+)`)
	valueOf  = func(body []byte, name string) string {
		found := regexp.MustCompile(`<` + name + `\b[^>]*>([^<]*)</` + name + `>`).FindSubmatch(body)
		if found == nil {
			return ""
		}
		var text string
		if xml.Unmarshal([]byte("<a>"+string(found[1])+"</a>"), &text) != nil {
			return ""
		}
		return text
	}
)

// match counts a call and finds what is to happen to it.
func (f *front) match(method string) rule {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, method)
	for i, r := range f.rules {
		if (r.At == 0 || r.At == len(f.calls)) && (r.Method == "" || r.Method == method) {
			if f.rules[i].Times--; f.rules[i].Times <= 0 {
				f.rules = append(f.rules[:i], f.rules[i+1:]...)
			}
			return r
		}
	}
	return rule{}
}

func (f *front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil || r.URL.Path != "/sdk" {
		http.NotFound(w, r)
		return
	}
	method := "?"
	if found := methodOf.FindSubmatch(body); found != nil {
		method = string(found[1])
	}
	hit := f.match(method)
	switch hit.Kind {
	case "fault":
		fault(w, "RuntimeFault", "injected by the test")
		return
	case "drop":
		panic(http.ErrAbortHandler)
	case "hold":
		time.Sleep(time.Duration(hit.Delay) * time.Millisecond)
	}
	if method == "RegisterVM_Task" && !f.mayRegister(w, body) {
		return
	}
	if method == "UnregisterVM" {
		f.remember(body)
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	answer := &recorder{header: http.Header{}, code: http.StatusOK}
	f.service.ServeSDK(answer, r)
	f.after(method, body)
	if hit.Kind == "lost" {
		panic(http.ErrAbortHandler)
	}
	for name, values := range answer.header {
		w.Header()[name] = values
	}
	w.WriteHeader(answer.code)
	if _, err := w.Write(answer.body.Bytes()); err != nil {
		log.Printf("%s: nobody takes the answer", method)
	}
}

func fault(w http.ResponseWriter, kind, text string) {
	w.WriteHeader(http.StatusInternalServerError)
	fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/">`+
		`<soapenv:Body><soapenv:Fault><faultcode>ServerFaultCode</faultcode><faultstring>%s</faultstring><detail>`+
		`<%sFault xmlns="urn:vim25" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:type="%s"/></detail>`+
		`</soapenv:Fault></soapenv:Body></soapenv:Envelope>`, text, kind, kind)
}

// mayRegister refuses a VM of a volume that the host has not mounted.
func (f *front) mayRegister(w http.ResponseWriter, body []byte) bool {
	host := types.ManagedObjectReference{Type: "HostSystem", Value: valueOf(body, "host")}
	if vmx := valueOf(body, "path"); host.Value != "" && !usable(vmx, host) {
		fault(w, "InvalidDatastore", "the datastore of "+vmx+" is not accessible")
		return false
	}
	return true
}

// find gives a VM by its reference.
func find(ref string) *simulator.VirtualMachine {
	for _, vm := range machines() {
		if vm.Self.Value == ref {
			return vm
		}
	}
	return nil
}

// remember keeps what lies on the datastore and the simulator would forget.
func (f *front) remember(body []byte) {
	if vm := find(valueOf(body, "_this")); vm != nil {
		f.mu.Lock()
		f.live[vm.Config.Files.VmPathName] = snapshots(vm)
		f.mu.Unlock()
	}
}

func (f *front) after(method string, body []byte) {
	switch method {
	case "CreateSnapshot_Task":
		vm := find(valueOf(body, "_this"))
		if vm == nil || !strings.HasPrefix(valueOf(body, "name"), "stillpoint-") {
			return
		}
		f.mu.Lock()
		f.cut[vm.Config.Files.VmPathName] = snapshots(vm)
		f.mu.Unlock()
	case "RegisterVM_Task":
		f.restore(valueOf(body, "path"))
	}
}

// restore gives a registered VM the snapshots that lie on its volume: which ones, the LUN's real content says.
func (f *front) restore(vmx string) {
	for _, vm := range machines() {
		if vm.Config.Files.VmPathName != vmx || vm.Snapshot != nil {
			continue
		}
		f.mu.Lock()
		names := f.live[vmx]
		if f.isCut() {
			names = f.cut[vmx]
		}
		f.mu.Unlock()
		vm.Guest.ToolsRunningStatus = "guestToolsRunning"
		for i, name := range names {
			if vm.Snapshot == nil {
				vm.Snapshot = &types.VirtualMachineSnapshotInfo{}
			}
			s := &simulator.VirtualMachineSnapshot{}
			s.Vm = vm.Self
			s.Config = *vm.Config
			simulator.Map.Put(s)
			vm.Snapshot.CurrentSnapshot = &s.Self
			vm.Snapshot.RootSnapshotList = append(vm.Snapshot.RootSnapshotList, types.VirtualMachineSnapshotTree{
				Snapshot: s.Self, Vm: vm.Self, Name: name, Id: int32(i + 1), CreateTime: time.Now(), State: "poweredOff",
				ReplaySupported: types.NewBool(false),
			})
		}
	}
}

func (f *front) isCut() bool {
	if f.content == "" {
		return false
	}
	out, err := exec.Command(f.content).Output()
	if err != nil {
		log.Printf("%s: %v", f.content, err)
	}
	return strings.TrimSpace(string(out)) == "cut"
}

// snapshots lists the names of a VM's snapshots, parents first.
func snapshots(vm *simulator.VirtualMachine) []string {
	names := []string{}
	var walk func([]types.VirtualMachineSnapshotTree)
	walk = func(list []types.VirtualMachineSnapshotTree) {
		for _, s := range list {
			names = append(names, s.Name)
			walk(s.ChildSnapshotList)
		}
	}
	if vm.Snapshot != nil {
		walk(vm.Snapshot.RootSnapshotList)
	}
	return names
}

// recorder keeps an answer until it is known whether it is to arrive.
type recorder struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(code int)        { r.code = code }
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }
