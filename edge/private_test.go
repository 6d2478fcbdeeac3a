package edge

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// serveNTLM authenticates connections, as IIS does: what comes on one after the
// log-in is answered as its user, with credentials or without.
func serveNTLM(t *testing.T, scheme string) *rawBackend {
	return serveRaw(t, "http/1.1", func(c net.Conn, n int) {
		reader := bufio.NewReader(c)
		user := ""
		for {
			r, err := http.ReadRequest(reader)
			if err != nil {
				return
			}
			credentials := r.Header.Get("Authorization")
			if name, ok := strings.CutPrefix(credentials, scheme+" user-"); ok {
				user = name
			}
			switch {
			case r.URL.Path == "/open":
				fmt.Fprint(c, ok(fmt.Sprintf("open on %d", n)))
			case user == "" && credentials == "":
				fmt.Fprintf(c, "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\", %s\r\nContent-Length: 0\r\n\r\n", scheme)
			case user == "":
				fmt.Fprintf(c, "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: %s Y2hhbGxlbmdl\r\nContent-Length: 0\r\n\r\n", scheme)
			default:
				fmt.Fprint(c, ok(fmt.Sprintf("%s on %d", user, n)))
			}
		}
	})
}

// TestConnectionLogins: a connection that a client logged in on serves nobody
// else, in every mode of reuse and from every protocol.
func TestConnectionLogins(t *testing.T) {
	for _, mode := range []resealv1.Connections_Reuse{
		resealv1.Connections_REUSE_ALWAYS, resealv1.Connections_REUSE_AGGRESSIVE, resealv1.Connections_REUSE_SAFE, resealv1.Connections_REUSE_NEVER,
	} {
		for _, scheme := range []string{"NTLM", "Negotiate"} {
			t.Run(fmt.Sprint(mode, " ", scheme), func(t *testing.T) {
				b := serveNTLM(t, scheme)
				x := newLegs(t, b.address, func(_ *resealv1.Listener, p *resealv1.BackendPool) {
					p.Connections = &resealv1.Connections{Reuse: mode}
				})
				for i, alpn := range []string{"http/1.1", "h2"} {
					alice, bob := x.visitor(alpn), x.visitor(alpn)
					name := fmt.Sprint("alice", i)
					if status, _ := alice("/", ""); status != "401" {
						t.Fatalf("%s: alice without credentials: %s", alpn, status)
					}
					if status, _ := alice("/", scheme+" negotiate"); status != "401" {
						t.Fatalf("%s: alice's first message: %s", alpn, status)
					}
					status, first := alice("/", scheme+" user-"+name)
					if status != "200" || !strings.HasPrefix(first, name+" on ") {
						t.Fatalf("%s: alice logs in: %s %q", alpn, status, first)
					}
					for range 5 {
						if status, body := bob("/", ""); status != "401" {
							t.Fatalf("%s: bob without credentials: %s %q", alpn, status, body)
						}
						if status, body := alice("/", ""); status != "200" || body != first {
							t.Fatalf("%s: alice again: %s %q, first %q", alpn, status, body, first)
						}
					}
				}
			})
		}
	}
}

// TestPrivateConnectionsEnd: they end with their client, and are counted.
func TestPrivateConnectionsEnd(t *testing.T) {
	b := serveNTLM(t, "NTLM")
	x := newLegs(t, b.address)
	conn := x.dial("http/1.1")
	reader := bufio.NewReader(conn)
	x.exchange(conn, reader, "GET / HTTP/1.1\r\nHost: public.test\r\nAuthorization: NTLM user-alice\r\n\r\n")
	if n := x.metric(t, "reseal_backend_connections_private_total"); n != 1 {
		t.Errorf("%v private connections were counted", n)
	}
	conn.Close()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		b.mu.Lock()
		backend := b.open[0].(*tls.Conn)
		b.mu.Unlock()
		if backend.NetConn().SetDeadline(time.Time{}) != nil {
			break // the backend has closed it
		}
		if time.Now().After(deadline) {
			t.Fatal("the connection outlives its client")
		}
	}
}

// visitor is a client with one connection. It returns the status and the body
// of the answer to a GET.
func (x *bothLegs) visitor(alpn string) func(path, credentials string) (status, body string) {
	if alpn == "h2" {
		c, stream := x.dialH2(), uint32(1)
		return func(path, credentials string) (string, string) {
			var more []string
			if credentials != "" {
				more = []string{"authorization", credentials}
			}
			c.get(stream, path, "public.test", more...)
			a := c.answer(stream)
			stream += 2
			return a.status, a.body
		}
	}
	conn := x.dial(alpn)
	reader := bufio.NewReader(conn)
	return func(path, credentials string) (string, string) {
		field := ""
		if credentials != "" {
			field = "Authorization: " + credentials + "\r\n"
		}
		response, body := x.exchange(conn, reader, "GET "+path+" HTTP/1.1\r\nHost: public.test\r\n"+field+"\r\n")
		return fmt.Sprint(response.StatusCode), body
	}
}

// metric is the sum of a metric's values.
func (x *bothLegs) metric(t *testing.T, name string) (sum float64) {
	t.Helper()
	families, err := x.edge.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == name {
			for _, metric := range family.GetMetric() {
				sum += metric.GetCounter().GetValue()
			}
		}
	}
	return sum
}
