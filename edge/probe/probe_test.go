package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const allSurvive = "close_notify=yes fin=yes reset=yes abort=yes"

// TestGoServer: tickets in TLS 1.2 and 1.3, taken any number of times.
func TestGoServer(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("go"), serverOptions{})
	r := probe(t, Config{Address: s.address, Roots: a.roots()})
	if v := version(t, r, tls12); v.Mechanism != resealv1.Mechanism_MECHANISM_TICKET || survives(v) != allSurvive {
		t.Errorf("TLS 1.2: %v", v)
	}
	v := version(t, r, tls13)
	if v.Mechanism != resealv1.Mechanism_MECHANISM_PSK || survives(v) != allSurvive || v.SingleUse != answerNo ||
		v.Tickets != 1 || v.LifetimeHint.AsDuration() != 7*24*time.Hour {
		t.Errorf("TLS 1.3: %v", v)
	}
	if r.Alpn != "h2" || r.KeepAlive.Reusable != answerYes || r.KeepAlive.Status != 200 {
		t.Errorf("ALPN %q, keep-alive %v", r.Alpn, r.KeepAlive)
	}
	first := r.Addresses[0]
	if first.Address != s.address || first.Subject != "CN=go" || len(first.Certificate) != 64 || !slices.Contains(first.Names, "backend.test") {
		t.Errorf("address %v", first)
	}
	if opened, requests := s.counts(); opened != len(r.Connections) || requests != 14 {
		t.Errorf("%d connections and %d requests at the server, %d connections in the report", opened, requests, len(r.Connections))
	}
	if !strings.Contains(r.Advice, "resume by pre-shared key") || r.Pool.GetSessions() != nil {
		t.Errorf("advice %q, pool %v", r.Advice, r.Pool)
	}
}

// TestCapture: the connections show what was offered and answered.
func TestCapture(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("go"), serverOptions{})
	r := probe(t, Config{Address: s.address, ServerName: "backend.test", Roots: a.roots()})
	full, resumed := r.Connections[1], r.Connections[2]
	if full.Resumed || full.Offered.Ticket != "" || full.Offered.ServerName != "backend.test" || full.Answered.Version != tls12 {
		t.Errorf("full: %v", full)
	}
	if !resumed.Resumed || len(resumed.Offered.Ticket) != 8 || !resumed.Answered.Echoed || resumed.Offered.SessionIdGiven ||
		resumed.Answered.SessionId != resumed.Offered.SessionId || resumed.Close != resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH {
		t.Errorf("resumed: %v", resumed)
	}
	for i, c := range r.Connections {
		if c.Number != uint32(i+1) || c.Offered == nil || c.Answered == nil || c.Ending == 0 {
			t.Errorf("connection %v", c)
		}
		if psk := c.GetOffered().GetPsk() != ""; psk != c.Answered.Psk {
			t.Errorf("pre-shared key offered %v, taken %v", psk, c.Answered.Psk)
		}
	}
}

// TestSessionIDs: OpenSSL without tickets. It forgets sessions of connections
// that end with FIN alone.
func TestSessionIDs(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	address := startOpenSSL(t, a, "-tls1_2", "-no_ticket", "-www")
	r := probe(t, Config{Address: address, Roots: a.roots()})
	v := version(t, r, tls12)
	if v.Mechanism != resealv1.Mechanism_MECHANISM_SESSION_ID || v.SingleUse != answerNo || v.Tickets != 0 {
		t.Errorf("TLS 1.2: %v", v)
	}
	if got := survives(v); got != "close_notify=yes fin=no reset=yes abort=yes peer=yes" {
		t.Errorf("survives %s", got)
	}
	if v := version(t, r, tls13); v.Supported || v.Error == "" || strings.Contains(v.Error, address) {
		t.Errorf("TLS 1.3: %v", v)
	}
	if r.KeepAlive.Reusable != answerNo || r.Connections[1].Ending != endPeer {
		t.Errorf("keep-alive %v, connection %v", r.KeepAlive, r.Connections[1])
	}
	if !strings.Contains(r.Advice, "forgets a session after FIN without close_notify") || !strings.Contains(r.Advice, "closes the connection after each answer") {
		t.Errorf("advice %q", r.Advice)
	}
	offered := r.Connections[2].Offered
	if !offered.SessionIdGiven || offered.SessionId != r.Connections[1].Answered.SessionId {
		t.Errorf("offered %v after %v", offered, r.Connections[1].Answered)
	}
}

// TestSessionIDsWithoutHandshaker: what can't be tried is not claimed.
func TestSessionIDsWithoutHandshaker(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	address := startOpenSSL(t, a, "-tls1_2", "-no_ticket", "-www")
	p, err := New(Config{Address: address, Roots: a.roots()})
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if v := version(t, r, tls12); v.Mechanism != 0 || !strings.Contains(v.Unresumed, "not tried") || len(v.Survives) != 0 {
		t.Errorf("TLS 1.2: %v", v)
	}
}

// TestOpenSSLTickets: TLS 1.2 tickets carry a lifetime hint.
func TestOpenSSLTickets(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	address := startOpenSSL(t, a, "-tls1_2", "-www")
	r := probe(t, Config{Address: address, Roots: a.roots()})
	v := version(t, r, tls12)
	if v.Mechanism != resealv1.Mechanism_MECHANISM_TICKET || v.LifetimeHint.AsDuration() != 7200*time.Second || v.Tickets != 1 {
		t.Errorf("TLS 1.2: %v", v)
	}
}

// TestOpenSSLSingleUse: where early data is allowed, OpenSSL takes each ticket
// once.
func TestOpenSSLSingleUse(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	address := startOpenSSL(t, a, "-tls1_3", "-max_early_data", "1000", "-num_tickets", "3", "-www")
	r := probe(t, Config{Address: address, Roots: a.roots()})
	v := version(t, r, tls13)
	if v.Mechanism != resealv1.Mechanism_MECHANISM_PSK || v.Tickets != 3 || v.TicketsResumed == 0 || v.SingleUse != answerYes {
		t.Errorf("TLS 1.3: %v", v)
	}
	if !strings.Contains(r.Advice, "TLS 1.3: each ticket once, one per handshake (3 with a full one)") || strings.Contains(r.Advice, "sharing: fleet") {
		t.Errorf("advice %q", r.Advice)
	}
	if v := version(t, r, tls12); v.Supported {
		t.Errorf("TLS 1.2: %v", v)
	}
}

func TestNoTickets(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	address := startOpenSSL(t, a, "-tls1_3", "-num_tickets", "0", "-www")
	r := probe(t, Config{Address: address, Roots: a.roots()})
	if v := version(t, r, tls13); v.Mechanism != 0 || v.Unresumed != "it gives out no tickets" {
		t.Errorf("TLS 1.3: %v", v)
	}
	if !strings.Contains(r.Advice, "No session is resumed") {
		t.Errorf("advice %q", r.Advice)
	}
}

// TestStrictServer: the server forgets a session when its connection ends
// without close_notify, which is seen twice before it is believed.
func TestStrictServer(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("strict"), serverOptions{strict: true})
	r := probe(t, Config{Address: s.address, Roots: a.roots()})
	for _, v := range r.Versions {
		if got := survives(v); got != "close_notify=yes fin=no reset=no abort=no" {
			t.Errorf("%v: survives %s", v.Version, got)
		}
		for _, ending := range []resealv1.ProbeEnding{endFIN, endReset, endAbort} {
			if s := survival(v, ending); s.Tried != 2 || s.Resumed != 0 {
				t.Errorf("%v", s)
			}
		}
	}
	if !strings.Contains(r.Advice, "forgets a session after FIN without close_notify, RST or an abort during an answer") {
		t.Errorf("advice %q", r.Advice)
	}
}

func TestSingleUseServer(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("once"), serverOptions{once: true})
	r := probe(t, Config{Address: s.address, Roots: a.roots()})
	if v := version(t, r, tls13); v.SingleUse != answerYes || survives(v) != allSurvive {
		t.Errorf("TLS 1.3: %v", v)
	}
}

func TestDisabledResumption(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("none"), serverOptions{tls: &tls.Config{SessionTicketsDisabled: true}})
	r := probe(t, Config{Address: s.address, Roots: a.roots()})
	if v := version(t, r, tls12); v.Mechanism != 0 || v.Unresumed != "it gives out neither a session ID nor a ticket" {
		t.Errorf("TLS 1.2: %v", v)
	}
	if len(r.Connections) != 3 {
		t.Errorf("%d connections, there is nothing to try after 3", len(r.Connections))
	}
}

// TestDeclining: tickets that are worth nothing are found out.
func TestDeclining(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("forgetful"), serverOptions{tls: &tls.Config{
		UnwrapSession: func([]byte, tls.ConnectionState) (*tls.SessionState, error) { return nil, nil },
	}})
	r := probe(t, Config{Address: s.address, Roots: a.roots()})
	for _, v := range r.Versions {
		if v.Mechanism != 0 || !strings.Contains(v.Unresumed, "declines every one") {
			t.Errorf("%v", v)
		}
	}
	if len(r.Connections) > 10 {
		t.Errorf("%d connections to find out that nothing is resumed", len(r.Connections))
	}
}

func TestClosingServer(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("closes"), serverOptions{closes: true})
	r := probe(t, Config{Address: s.address, Roots: a.roots()})
	if r.KeepAlive.Reusable != answerNo || r.KeepAlive.Connection != "close" {
		t.Errorf("keep-alive %v", r.KeepAlive)
	}
	if got := survives(version(t, r, tls13)); got != allSurvive {
		t.Errorf("survives %s", got)
	}
	if got := survives(version(t, r, tls12)); got != allSurvive+" peer=yes" {
		t.Errorf("survives %s", got)
	}
}

// TestLongAnswer: that the probe does not read an answer to its end does not
// mean that the server closes connections.
func TestLongAnswer(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("long"), serverOptions{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(maxBody+1))
		if r.Method == http.MethodGet {
			_, _ = w.Write(make([]byte, maxBody+1))
		}
	})})
	r := probe(t, Config{Address: s.address, Roots: a.roots()})
	if r.KeepAlive.Reusable != 0 || r.KeepAlive.Note != "the answer has more than 4 MiB; request a shorter one to see" {
		t.Errorf("keep-alive %v", r.KeepAlive)
	}
	if strings.Contains(r.Advice, "closes the connection") {
		t.Errorf("advice %q", r.Advice)
	}
}

// TestEndlessAnswer: the bound on an answer holds for what goes over the network.
func TestEndlessAnswer(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	const enough = 32 * maxBody
	var most atomic.Int64
	s := startGo(t, a.issue("endless"), serverOptions{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet {
			return
		}
		piece := make([]byte, 64<<10)
		for sent := int64(0); sent < enough; sent += int64(len(piece)) {
			most.Store(max(most.Load(), sent))
			if _, err := w.Write(piece); err != nil {
				return
			}
		}
	})})
	r := probe(t, Config{Address: s.address, Roots: a.roots()})
	// What the kernels hold on the way comes on top.
	if sent := most.Load(); sent > enough/2 {
		t.Errorf("the server sent %d bytes of an answer, the bound is %d", sent, maxBody)
	}
	if strings.Contains(r.Advice, "did not end") {
		t.Errorf("advice %q", r.Advice)
	}
	for _, v := range r.Versions {
		if got := survives(v); got != allSurvive {
			t.Errorf("%v survives %s", v.Version, got)
		}
	}
}

// TestLongestAnswer: an answer that is just within the bound is read.
func TestLongestAnswer(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("longest"), serverOptions{handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write(make([]byte, maxBody))
	})})
	if r := probe(t, Config{Address: s.address, Roots: a.roots()}); r.KeepAlive.Reusable != answerYes {
		t.Errorf("keep-alive %v", r.KeepAlive)
	}
}

// TestAbortDuringAnswer: a long answer is really cut, a short one is said to be.
func TestAbortDuringAnswer(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	cut := make(chan error, 100)
	long := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "3000000")
		if r.Method == http.MethodGet {
			_, err := w.Write(make([]byte, 3_000_000))
			cut <- err
		}
	})
	s := startGo(t, a.issue("long"), serverOptions{handler: long})
	r := probe(t, Config{Address: s.address, Roots: a.roots(), Path: "/long"})
	if note := survival(version(t, r, tls13), endAbort).Note; note != "" {
		t.Errorf("note %q", note)
	}
	failed := 0
	for range 3 { // two are aborted, one was read for its header
		if err := <-cut; err != nil {
			failed++
		}
	}
	if failed != 2 {
		t.Errorf("%d answers were cut, want one per version", failed)
	}
	short := startGo(t, a.issue("short"), serverOptions{})
	r = probe(t, Config{Address: short.address, Roots: a.roots()})
	if note := survival(version(t, r, tls13), endAbort).Note; !strings.Contains(note, "only 6 bytes") {
		t.Errorf("note %q", note)
	}
}

func TestIdle(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("idle"), serverOptions{idle: 300 * time.Millisecond})
	r := probe(t, Config{Address: s.address, Roots: a.roots(), Idle: 2 * time.Second})
	if !r.KeepAlive.Closed || r.KeepAlive.Idle.AsDuration() >= 2*time.Second {
		t.Errorf("keep-alive %v", r.KeepAlive)
	}
	for _, v := range r.Versions {
		if s := survival(v, resealv1.ProbeEnding_PROBE_ENDING_IDLE); s.Answer != answerYes || s.Note != "2s" {
			t.Errorf("%v: %v", v.Version, s)
		}
	}
}

func TestIdleKept(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("idle"), serverOptions{})
	r := probe(t, Config{Address: s.address, Roots: a.roots(), Idle: 100 * time.Millisecond})
	if r.KeepAlive.Closed || r.KeepAlive.Idle.AsDuration() < 100*time.Millisecond {
		t.Errorf("keep-alive %v", r.KeepAlive)
	}
}

// TestHTTP2Only: without HTTP/1.1 there are still handshakes.
func TestHTTP2Only(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	address := startOpenSSL(t, a, "-alpn", "h2")
	r := probe(t, Config{Address: address, Roots: a.roots()})
	if r.Alpn != "h2" || r.KeepAlive.Reusable != 0 || !strings.Contains(strings.Join(r.Notes, " "), "takes no HTTP/1.1, only h2") {
		t.Errorf("ALPN %q, notes %q, keep-alive %v", r.Alpn, r.Notes, r.KeepAlive)
	}
	for _, v := range r.Versions {
		if got := survives(v); !strings.HasPrefix(got, "close_notify=yes fin=") {
			t.Errorf("%v survives %s", v.Version, got)
		}
	}
	if r.Pool.Protocol != 0 {
		t.Errorf("pool %v", r.Pool)
	}
}

// TestNotHTTP: a protocol in which the server answers something else.
func TestNotHTTP(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	address := startRaw(t, &tls.Config{Certificates: []tls.Certificate{a.issue("echo")}}, func(conn *tls.Conn) {
		_, _ = io.Copy(conn, conn)
	})
	r := probe(t, Config{Address: address, Roots: a.roots()})
	if r.Pool.Protocol != resealv1.BackendPool_PROTOCOL_TCP || !strings.Contains(r.Advice, "does not speak HTTP") {
		t.Errorf("advice %q, pool %v", r.Advice, r.Pool)
	}
	if got := survives(version(t, r, tls13)); got != "close_notify=yes fin=yes reset=yes" {
		t.Errorf("survives %s", got)
	}
	r = probe(t, Config{Address: address, Roots: a.roots(), NoRequests: true})
	if len(r.Notes) != 0 || r.Pool.Protocol != 0 {
		t.Errorf("notes %q, pool %v", r.Notes, r.Pool)
	}
	for _, c := range r.Connections {
		if c.Requests != 0 {
			t.Errorf("connection %v", c)
		}
	}
}

// TestSlowEnd: a server that does not end its side is told apart.
func TestSlowEnd(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	release := make(chan struct{})
	address := startRaw(t, &tls.Config{Certificates: []tls.Certificate{a.issue("slow")}}, func(conn *tls.Conn) {
		_ = conn.Handshake()
		<-release
	})
	defer close(release)
	r := probe(t, Config{Address: address, Roots: a.roots(), NoRequests: true, CloseTimeout: 30 * time.Millisecond,
		Policy: &resealv1.TLSPolicy{MinVersion: tls13}})
	if kind := r.Connections[0].Close; kind != resealv1.CloseKind_CLOSE_KIND_TIMEOUT {
		t.Errorf("close %v", kind)
	}
	if got := r.Pool.GetConnections().GetCloseTimeout().AsDuration(); got != 150*time.Millisecond {
		t.Errorf("closeTimeout %s", got)
	}
	if len(r.Versions) != 1 || r.Versions[0].Version != tls13 {
		t.Errorf("the policy allows TLS 1.3 only, tried %v", r.Versions)
	}
}

func TestClientCertificate(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	cert := a.issue("client")
	s := startGo(t, a.issue("mtls"), serverOptions{tls: &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: a.roots()}})
	r := probe(t, Config{Address: s.address, Roots: a.roots(), Certificates: []tls.Certificate{cert}})
	if v := version(t, r, tls13); survives(v) != allSurvive {
		t.Errorf("TLS 1.3: %v", v)
	}
	// The configuration of a pool takes the place of the single fields.
	r = probe(t, Config{Address: s.address, TLS: &tls.Config{RootCAs: a.roots(), Certificates: []tls.Certificate{cert},
		MaxVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}}})
	if v := version(t, r, tls12); survives(v) != allSurvive || len(r.Versions) != 1 || r.Alpn != "http/1.1" {
		t.Errorf("TLS 1.2: %v, ALPN %q", v, r.Alpn)
	}
}

func TestUntrusted(t *testing.T) {
	t.Parallel()
	a, other := newAuthority(t), newAuthority(t)
	s := startGo(t, a.issue("other"), serverOptions{})
	p, err := New(Config{Address: s.address, Roots: other.roots()})
	if err != nil {
		t.Fatal(err)
	}
	var untrusted *tls.CertificateVerificationError
	if _, err := p.Run(t.Context()); !errors.As(err, &untrusted) {
		t.Errorf("got %v", err)
	}
	if opened, _ := s.counts(); opened != 1 {
		t.Errorf("%d connections", opened)
	}
	r := probe(t, Config{Address: s.address, InsecureSkipVerify: true})
	if survives(version(t, r, tls13)) != allSurvive {
		t.Error("not verified, and yet not probed")
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	p, err := New(Config{Address: freeAddress(t)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("got %v", err)
	}
	p, err = New(Config{Address: "nowhere.test:443", Resolve: resolveTo()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "no addresses") {
		t.Errorf("got %v", err)
	}
}

func TestOldVersion(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	address := startRaw(t, &tls.Config{Certificates: []tls.Certificate{a.issue("old")}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11},
		func(conn *tls.Conn) { _, _ = io.Copy(io.Discard, conn) })
	p, err := New(Config{Address: address, Roots: a.roots()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "speaks TLS 1.1 and nothing newer") {
		t.Errorf("got %v", err)
	}
}

// TestBound: the bound on connections ends the probe, and what is known counts.
func TestBound(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("go"), serverOptions{})
	for _, bound := range []int{1, 2, 5, 9} {
		r := probe(t, Config{Address: s.address, Roots: a.roots(), MaxConnections: bound})
		if len(r.Connections) != bound || !strings.Contains(strings.Join(r.Notes, " "), "stopped after") || r.Advice == "" {
			t.Errorf("bound %d: %d connections, notes %q, advice %q", bound, len(r.Connections), r.Notes, r.Advice)
		}
	}
}

// TestDeadline: what was found out until the deadline counts; an interrupt is an
// error.
func TestDeadline(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("go"), serverOptions{})
	for _, cancelled := range []bool{false, true} {
		p, err := New(Config{Address: s.address, Roots: a.roots(), Idle: time.Hour, Policy: &resealv1.TLSPolicy{MinVersion: tls13}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
		if cancelled {
			time.AfterFunc(time.Second, cancel)
		}
		r, err := p.Run(ctx)
		cancel()
		switch {
		case cancelled && !errors.Is(err, context.Canceled):
			t.Errorf("interrupted: %v", err)
		case !cancelled && (err != nil || survives(version(t, r, tls13)) != allSurvive || len(r.Notes) != 1):
			t.Errorf("deadline: %v, %v", r, err)
		}
	}
}

// TestAddresses: three servers of one name, of which two share ticket keys.
func TestAddresses(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	key := [32]byte{1}
	common := func() *tls.Config {
		cfg := &tls.Config{}
		cfg.SetSessionTicketKeys([][32]byte{key})
		return cfg
	}
	cert := a.issue("shared")
	first := startGo(t, cert, serverOptions{tls: common()})
	_, port, _ := net.SplitHostPort(first.address)
	startGo(t, cert, serverOptions{tls: common(), listen: "127.0.0.2:" + port})
	both := probe(t, Config{Address: "backend.test:" + port, Roots: a.roots(), Resolve: resolveTo("127.0.0.1", "127.0.0.2")})
	if both.Shared != answerYes || both.SameCertificate != answerYes || both.Pool.GetSessions().GetScope() != resealv1.Sessions_SCOPE_POOL ||
		both.Pool.GetDns().GetName() != "backend.test" || both.Addresses[1].Shares != answerYes || !strings.Contains(both.Advice, "sessions.scope: pool") {
		t.Errorf("two that share: %s", describe(both))
	}
	startGo(t, a.issue("alone"), serverOptions{listen: "127.0.0.3:" + port})
	three := probe(t, Config{Address: "backend.test:" + port, Roots: a.roots(), Resolve: resolveTo("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")})
	if three.Shared != answerMixed || three.SameCertificate != answerNo || three.Addresses[2].Shares != answerNo || three.Pool.GetSessions() != nil {
		t.Errorf("one of three is alone: %s", describe(three))
	}
	if three.Addresses[3].Error == "" {
		t.Error("nothing listens at the fourth address, and nobody says so")
	}
	// The first that answers is the one with all the facts.
	last := probe(t, Config{Address: "backend.test:" + port, Roots: a.roots(), Resolve: resolveTo("127.0.0.4", "127.0.0.3")})
	if last.Addresses[0].Address != "127.0.0.3:"+port || last.Addresses[1].Error == "" || last.Shared != 0 {
		t.Errorf("the second answers: %s", describe(last))
	}
}

// TestAddressesWithSessionIDs: sessions by ID are offered to other addresses too.
func TestAddressesWithSessionIDs(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	address := startOpenSSL(t, a, "-tls1_2", "-no_ticket", "-www")
	_, port, _ := net.SplitHostPort(address)
	startGo(t, a.issue("other"), serverOptions{listen: "127.0.0.2:" + port, tls: &tls.Config{MaxVersion: tls.VersionTLS12}})
	startGo(t, a.issue("third"), serverOptions{listen: "127.0.0.3:" + port, tls: &tls.Config{MaxVersion: tls.VersionTLS12}})
	r := probe(t, Config{Address: "backend.test:" + port, Roots: a.roots(), Resolve: resolveTo("127.0.0.1", "127.0.0.2", "127.0.0.3")})
	if r.Shared != answerNo || r.Addresses[1].Shares != answerNo || r.Addresses[2].Shares != answerNo || r.SameCertificate != answerNo {
		t.Errorf("nothing is shared: %s", describe(r))
	}
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		cfg  Config
		want string
	}{
		{Config{}, "is not host:port"},
		{Config{Address: "backend.test"}, "is not host:port"},
		{Config{Address: "backend.test:https"}, "is not host:port"},
		{Config{Address: "backend.test:0"}, "is not host:port"},
		{Config{Address: ":443"}, "is not host:port"},
		{Config{Address: "a:1", Path: "x"}, "does not begin with /"},
		{Config{Address: "a:1", Path: "/a b\r\nX: y"}, "can't hold"},
		{Config{Address: "a:1", ServerName: "a\r\nX: y"}, "can't hold"},
		{Config{Address: "a:1", Idle: -1}, "negative"},
		{Config{Address: "a:1", Policy: &resealv1.TLSPolicy{CipherSuites: []string{"NONE"}}}, `cipher suite "NONE"`},
		{Config{Address: "a:1", Policy: &resealv1.TLSPolicy{Curves: []string{"NONE"}}}, `curve "NONE"`},
		{Config{Address: "a:1", Policy: &resealv1.TLSPolicy{MinVersion: tls13, MaxVersion: tls12}}, "above"},
		{Config{Address: "a:1", Policy: &resealv1.TLSPolicy{MinVersion: 9}}, "unknown value"},
		{Config{Address: "a:1", TLS: &tls.Config{MinVersion: tls.VersionTLS13, MaxVersion: tls.VersionTLS12}}, "above"},
	} {
		if _, err := New(test.cfg); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v, want %q", test.cfg, err, test.want)
		}
	}
}

func TestPolicy(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("go"), serverOptions{})
	const suite = "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"
	r := probe(t, Config{Address: s.address, Roots: a.roots(), Policy: &resealv1.TLSPolicy{
		MaxVersion: tls12, CipherSuites: []string{suite}, Curves: []string{"P384"}}})
	if v := version(t, r, tls12); v.CipherSuite != suite || v.Curve != "CurveP384" || len(r.Versions) != 1 {
		t.Errorf("TLS 1.2: %v", v)
	}
}

func TestKeepAliveHint(t *testing.T) {
	t.Parallel()
	for header, want := range map[string][2]int{
		"": {0, 0}, "timeout=5": {5, 0}, "timeout=5, max=100": {5, 100}, "Max=7 ,x, TIMEOUT = 3": {3, 7}, "timeout=-1": {0, 0}, "timeout=99999999999": {0, 0},
	} {
		if seconds, requests := keepAliveHint(header); seconds != want[0] || requests != want[1] {
			t.Errorf("%q: %d, %d", header, seconds, requests)
		}
	}
}

func TestKeepAliveAdvice(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	s := startGo(t, a.issue("hints"), serverOptions{handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Keep-Alive", "timeout=10, max=50")
	})})
	r := probe(t, Config{Address: s.address, Roots: a.roots()})
	connections := r.Pool.GetConnections()
	if connections.GetIdleTimeout().AsDuration() != 8*time.Second || connections.GetMaxRequests() != 49 {
		t.Errorf("connections %v, advice %q", connections, r.Advice)
	}
}
