package frontend

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/edge/exchange"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// authPolicy gives a listener a policy for clients' certificates.
func authPolicy(key string, auth tls.ClientAuthType, roots *x509.CertPool, verify func(tls.ConnectionState) error) func(*exchange.Listener) {
	return func(l *exchange.Listener) {
		l.PolicyKey = key
		l.TLS = l.TLS.Clone()
		l.TLS.ClientAuth, l.TLS.ClientCAs, l.TLS.VerifyConnection = auth, roots, verify
	}
}

// changes are changes of policy after which one client must leave and another
// may stay.
type policyChange struct {
	before, after func(*exchange.Listener)
	leaves, stays func(*tls.Config)
}

func policyChanges(t *testing.T) map[string]policyChange {
	first, _ := selfSigned(t, "first")
	second, secondRoots := selfSigned(t, "second")
	both := x509.NewCertPool()
	both.AddCert(first.Leaf)
	both.AddCert(second.Leaf)
	none := func(*tls.Config) {}
	with := func(certificate tls.Certificate) func(*tls.Config) {
		return func(c *tls.Config) { c.Certificates = []tls.Certificate{certificate} }
	}
	// As plan's revocation lists do.
	revoked := func(state tls.ConnectionState) error {
		for _, chain := range state.VerifiedChains {
			if chain[0].Equal(first.Leaf) {
				return errors.New("revoked")
			}
		}
		return nil
	}
	optional := authPolicy("optional", tls.VerifyClientCertIfGiven, both, nil)
	return map[string]policyChange{
		"a certificate is required": {optional, authPolicy("require", tls.RequireAndVerifyClientCert, both, nil), none, with(second)},
		"a CA is removed":           {optional, authPolicy("second", tls.VerifyClientCertIfGiven, secondRoots, nil), with(first), none},
		"one is revoked":            {optional, authPolicy("crl", tls.VerifyClientCertIfGiven, both, revoked), with(first), with(second)},
	}
}

// TestClientsLeaveWithPolicy: when a new policy would not let a client in, its
// open connections end, too: requests in flight finish, further ones are refused.
func TestClientsLeaveWithPolicy(t *testing.T) {
	for name, change := range policyChanges(t) {
		arrived, finish := make(chan struct{}), make(chan struct{})
		upstream := upstreamFuncs{roundTrip: func(r *http.Request, _ *exchange.Exchange) (*http.Response, error) {
			if r.URL.Path == "/slow" {
				arrived <- struct{}{}
				<-finish
			}
			return textResponse(200, "ok"), nil
		}}
		t.Run(name+", http/1.1", func(t *testing.T) {
			e := newEdge(t, upstream, change.before)
			ask := func(conn net.Conn, path string) { fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: app.test\r\n\r\n", path) }
			answer := func(conn *bufio.Reader) *http.Response {
				t.Helper()
				response := must[*http.Response](t)(http.ReadResponse(conn, nil))
				bodyOf(t, response)
				return response
			}
			idle, busy, stays := e.dial(change.leaves), e.dial(change.leaves), e.dial(change.stays)
			fromIdle, fromBusy, fromStays := bufio.NewReader(idle), bufio.NewReader(busy), bufio.NewReader(stays)
			ask(idle, "/")
			answer(fromIdle)
			ask(stays, "/")
			answer(fromStays)
			ask(busy, "/slow")
			<-arrived
			e.apply(e.listener("main", change.after))
			if _, err := fromIdle.ReadByte(); err != io.EOF {
				t.Errorf("an idle connection ends with %v", err)
			}
			c := e.count("main")
			eventually(t, "the idle connection has ended", func() bool { return read(c, func(c *counts) bool { return c.gone == 1 }) })
			finish <- struct{}{}
			if response := answer(fromBusy); response.StatusCode != 200 || !response.Close {
				t.Errorf("the request in flight: %s, close %v", response.Status, response.Close)
			}
			if _, err := fromBusy.ReadByte(); err != io.EOF {
				t.Errorf("a busy connection ends with %v", err)
			}
			ask(stays, "/")
			if response := answer(fromStays); response.StatusCode != 200 || response.Close {
				t.Errorf("one that may stay: %s, close %v", response.Status, response.Close)
			}
		})
		t.Run(name+", h2", func(t *testing.T) {
			e := newEdge(t, upstream, change.before)
			idle, busy, stays := e.h2Dial(change.leaves), e.h2Dial(change.leaves), e.h2Dial(change.stays)
			for _, h := range []*h2Raw{idle, busy, stays} {
				_ = h.request(1, "GET", true)
				h.read(func(end *h2End) bool { return end.answers[1] == "200" })
			}
			busy.path = "/slow"
			_ = busy.request(3, "GET", true)
			<-arrived
			e.apply(e.listener("main", change.after))
			if end := idle.read(nil); !end.goAway || end.code != 0 || end.err != io.EOF {
				t.Errorf("an idle connection ends with %+v", end)
			}
			busy.path = "/"
			_ = busy.request(5, "GET", true)
			if end := busy.read(func(end *h2End) bool { return end.answers[5] != "" }); end.answers[5] != "421" {
				t.Errorf("a further request: %+v", end)
			}
			finish <- struct{}{}
			if end := busy.read(nil); end.answers[3] != "200" || end.err != io.EOF {
				t.Errorf("the request in flight: %+v", end)
			}
			if err := stays.ping(); err != nil {
				t.Errorf("one that may stay: %v", err)
			}
		})
		t.Run(name+", tls", func(t *testing.T) {
			e, _ := tcpEdge(t, func(backend *net.TCPConn) { _, _ = io.Copy(backend, backend) }, change.before)
			e.apply(e.listener("main", change.before, isTunnel))
			echo := func(conn net.Conn) error {
				_, _ = conn.Write([]byte{'x'})
				_, err := io.ReadFull(conn, make([]byte, 1))
				return err
			}
			plain := func(c *tls.Config) { c.NextProtos = nil }
			stays := e.dial(change.stays, plain)
			if err := echo(stays); err != nil {
				t.Fatal(err)
			}
			leaves := e.dial(change.leaves, plain)
			if err := echo(leaves); err != nil {
				t.Fatal(err)
			}
			e.apply(e.listener("main", change.after, isTunnel))
			if _, err := leaves.Read(make([]byte, 1)); err == nil {
				t.Error("a tunnel goes on")
			}
			if err := echo(stays); err != nil {
				t.Errorf("one that may stay: %v", err)
			}
			if record := e.logged(1); record["reason"] != "drain_timeout" {
				t.Errorf("logged %v", record)
			}
		})
	}
}

func isTunnel(l *exchange.Listener) {
	l.Spec.Protocol, l.TLS.NextProtos = resealv1.Listener_PROTOCOL_TLS, nil
	l.Spec.Timeouts.Drain = durationpb.New(300 * time.Millisecond)
}

// TestHandshakeDuringPolicyChange: a hello under the old policy that ends under
// the new one.
func TestHandshakeDuringPolicyChange(t *testing.T) {
	change := policyChanges(t)["a certificate is required"]
	e := newEdge(t, answering("ok"), change.before)
	cfg := &tls.Config{RootCAs: e.roots, ServerName: "app.test"}
	cfg.VerifyConnection = func(tls.ConnectionState) error { // the server has said hello, too
		e.apply(e.listener("main", change.after))
		return nil
	}
	conn := tls.Client(e.raw(), cfg)
	_ = conn.SetDeadline(time.Now().Add(patience))
	if err := conn.Handshake(); err != nil {
		t.Fatal(err) // TLS 1.3: the client is done before the server
	}
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: app.test\r\n\r\n")
	if got, err := io.ReadAll(conn); err == nil && len(got) > 0 {
		t.Errorf("served: %q", got)
	}
}
