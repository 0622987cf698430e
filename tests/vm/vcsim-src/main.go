// A vCenter for the stories: govmomi's simulator, with what a snapshot agent needs beside it.
//
//	storage.go    VMFS datastores on shared LUNs, mount and attach, with the rules that ESXi has (ResourceInUse)
//	front.go      the way in: counts calls, injects faults and delays, and keeps what lies on the datastores
//	control.go    what a test sees and changes, over HTTP
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"flag"
	"fmt"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/vmware/govmomi/simulator"
)

func main() {
	m := simulator.VPX()
	listen := flag.String("l", "127.0.0.1:0", "where the SDK is served (TLS)")
	control := flag.String("control", "127.0.0.1:0", "where tests look and steer (HTTP)")
	user := flag.String("username", "agent@vsphere.local", "")
	pass := flag.String("password", "secret", "")
	naas := flag.String("luns", "", "comma list of naa ids; the n-th becomes the only extent of the n-th datastore")
	iqns := flag.String("iqns", "", "comma list of iSCSI names; the n-th is the n-th host's")
	content := flag.String("content", "", "program that prints `cut` when a reverted LUN is back at its snapshot")
	flag.IntVar(&m.Datastore, "ds", 2, "datastores")
	flag.IntVar(&m.Machine, "vm", 3, "VMs")
	flag.IntVar(&m.ClusterHost, "hosts", 3, "hosts in the cluster")
	flag.Parse()
	m.Host = 0
	if err := m.Create(); err != nil {
		log.Fatal(err)
	}
	extend(split(*naas), split(*iqns))

	// The simulator's own server is never dialled: the front serves its handler.
	m.Service.Listen = &url.URL{Host: "127.0.0.1:0", User: url.UserPassword(*user, *pass)}
	inner := m.Service.NewServer()
	front := newFront(m.Service, *content)
	pair, fingerprint := certificate()
	sdk, err := tls.Listen("tcp", *listen, &tls.Config{Certificates: []tls.Certificate{pair}})
	if err != nil {
		log.Fatal(err)
	}
	steering, err := net.Listen("tcp", *control)
	if err != nil {
		log.Fatal(err)
	}
	go func() { log.Fatal(http.Serve(sdk, front)) }()
	go func() { log.Fatal(http.Serve(steering, controls(front))) }()
	fmt.Printf("vcsim sdk=%s control=%s sha256=%s\n", sdk.Addr(), steering.Addr(), fingerprint)

	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGINT, syscall.SIGTERM)
	<-sig
	inner.Close()
	m.Remove()
}

func split(list string) []string {
	if list == "" {
		return nil
	}
	return strings.Split(list, ",")
}

// A certificate of its own: the simulator's has a key that rustls refuses.
func certificate() (tls.Certificate, string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	template := x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: "vcenter"},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		DNSNames:     []string{"vcenter"},
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		log.Fatal(err)
	}
	sum := sha256.Sum256(der)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, strings.ToUpper(hex.EncodeToString(sum[:]))
}
