package frontend

import (
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// fleet is two edges with Holders of their own that were told the same, behind
// one address that sends each connection to the edge that did not get the one
// before.
type fleet struct {
	edges   []*edge
	keys    []*keySource
	address string
	roots   string // file
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{}
	for range 2 {
		keys := newKeys(t, ring("default", epoch(1, epochActive)))
		f.keys = append(f.keys, keys)
		f.edges = append(f.edges, newSharedEdge(t, keys))
	}
	// One certificate, as a fleet has.
	f.edges[1].cert, f.edges[1].roots = f.edges[0].cert, f.edges[0].roots
	f.edges[1].apply(f.edges[1].listener("main"))
	f.roots = filepath.Join(t.TempDir(), "roots.pem")
	leaf := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.edges[0].cert.Certificate[0]})
	if err := os.WriteFile(f.roots, leaf, 0o600); err != nil {
		t.Fatal(err)
	}
	f.address = alternate(t, f.edges[0].address("main"), f.edges[1].address("main"))
	return f
}

// alternate passes connections on to one address after another.
func alternate(t *testing.T, addresses ...string) string {
	t.Helper()
	listener := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	var running sync.WaitGroup
	t.Cleanup(func() { listener.Close(); running.Wait() })
	running.Go(func() {
		for i := 0; ; i++ {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", addresses[i%len(addresses)])
			if err != nil {
				t.Error(err)
				client.Close()
				return
			}
			pass := func(to, from net.Conn) {
				_, _ = io.Copy(to, from)
				_ = to.(*net.TCPConn).CloseWrite()
			}
			running.Go(func() {
				defer client.Close()
				defer server.Close()
				running.Go(func() { pass(server, client) })
				pass(client, server)
			})
		}
	})
	return listener.Addr().String()
}

// rotate brings a new epoch to all edges, in the order that a control plane
// keeps: it encrypts nowhere before it is known everywhere.
func (f *fleet) rotate(t *testing.T, to uint64) {
	t.Helper()
	for _, states := range [][2]resealv1.EpochState{{epochActive, epochPrepared}, {epochRetired, epochActive}} {
		for _, keys := range f.keys {
			said := []*resealv1.EpochSecret{epoch(to-1, states[0]), epoch(to, states[1])}
			for old := uint64(1); old < to-1; old++ {
				said = append(said, epoch(old, epochRetired))
			}
			keys.say(ring("default", said...))
			eventually(t, "the edge took the keys", func() bool { return len(keys.said) == 0 })
		}
	}
	for _, keys := range f.keys {
		eventually(t, "the epoch encrypts", func() bool {
			ticket, ok := keys.Keys("default", "main", "policy").Wrap(nil, "")
			return ok && ticket[7] == byte(to)
		})
	}
}

// handshakes are those of both edges: full ones of clients without a ticket,
// resumed ones, and all others.
func (f *fleet) handshakes() (full, resumed, missed int) {
	for _, e := range f.edges {
		read(e.count("main"), func(c *counts) int {
			for reason, n := range c.misses {
				if reason == notOffered {
					full += n
				} else {
					missed += n
				}
			}
			for _, n := range c.resumed {
				resumed += n
			}
			return 0
		})
	}
	return full, resumed, missed
}

func (f *fleet) want(t *testing.T, full, resumed int) {
	t.Helper()
	if gotFull, gotResumed, missed := f.handshakes(); gotFull != full || gotResumed != resumed || missed != 0 {
		t.Errorf("%d full, %d resumed, %d missed; want %d, %d, 0", gotFull, gotResumed, missed, full, resumed)
	}
}

func TestFleetGo(t *testing.T) {
	for _, version := range bothVersions {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			f := newFleet(t)
			const rotations, visits = 5, 4
			cache := tls.NewLRUClientSessionCache(0)
			for to := range rotations {
				if to > 0 {
					f.rotate(t, uint64(to+1))
				}
				for range visits {
					conn := must[*tls.Conn](t)(tls.Dial("tcp", f.address, &tls.Config{
						ServerName: "app.test", RootCAs: f.edges[0].roots, MaxVersion: version, ClientSessionCache: cache, NextProtos: []string{"http/1.1"},
					}))
					fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n")
					if answer, err := io.ReadAll(conn); err != nil || !strings.Contains(string(answer), "200 OK") {
						t.Errorf("%q %v", answer, err)
					}
					conn.Close()
				}
			}
			f.want(t, 1, rotations*visits-1)
		})
	}
}

func TestFleetOpenSSL(t *testing.T) {
	need(t, "openssl")
	for _, version := range []string{"1.2", "1.3"} {
		t.Run(version, func(t *testing.T) {
			f := newFleet(t)
			session := filepath.Join(t.TempDir(), "session")
			request := "GET / HTTP/1.1\r\nHost: app.test\r\nConnection: close\r\n\r\n"
			args := []string{"s_client", "-connect", f.address, "-servername", "app.test", "-CAfile", f.roots, "-verify_return_error",
				"-tls" + strings.Replace(version, ".", "_", 1), "-ign_eof", "-sess_out", session}
			for i := range 6 {
				want := "\nReused, TLSv" + version
				if i == 0 {
					want = "\nNew, TLSv" + version
				} else if i == 1 {
					args = append(args, "-sess_in", session)
				}
				if got := tool(t, request, "openssl", args...); !strings.Contains(got, want) || !strings.Contains(got, "200 OK") {
					t.Errorf("visit %d is not %q:\n%s", i, want, got)
				}
				f.rotate(t, uint64(i+2))
			}
			f.want(t, 1, 5)
		})
	}
}

func TestFleetCurl(t *testing.T) {
	need(t, "curl")
	for _, version := range []string{"1.2", "1.3"} {
		t.Run(version, func(t *testing.T) {
			f := newFleet(t)
			_, port, _ := net.SplitHostPort(f.address)
			args := []string{"-sS", "--http1.1", "--tlsv" + version, "--tls-max", version, "--cacert", f.roots, "--resolve", "app.test:" + port + ":127.0.0.1",
				"-H", "Connection: close", "-w", " %{http_code}\n"}
			const visits = 6
			for range visits {
				args = append(args, "https://app.test:"+port+"/")
			}
			if got := tool(t, "", "curl", args...); strings.Count(got, "ok 200\n") != visits {
				t.Errorf("got %q", got)
			}
			if version == "1.2" {
				// This curl offers no tickets with TLS 1.2 (SSL_OP_NO_TICKET).
				f.want(t, visits, 0)
			} else {
				f.want(t, 1, visits-1)
			}
		})
	}
}
