package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// startBackend serves TLS until the script ends and sets $BACKEND to its
// address: backend. Its certificate is for 127.0.0.1 and backend.test.
// backend mtls asks for a client certificate.
func startBackend(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("usage: backend [mtls]")
	}
	f := ts.Value(fakeKey{}).(*fakeServer)
	certPEM, keyPEM, err := f.authority.sign(&x509.Certificate{NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"backend.test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	ts.Check(err)
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	ts.Check(err)
	cfg := &tls.Config{Certificates: []tls.Certificate{cert}}
	if len(args) > 0 {
		cfg.ClientCAs = x509.NewCertPool()
		cfg.ClientCAs.AddCert(f.authority.cert)
		cfg.ClientAuth = tls.RequireAndVerifyClientCert
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	server := &http.Server{
		Handler:   http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello\n") }),
		TLSConfig: cfg, ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: time.Minute,
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = server.ServeTLS(listener, "", "")
	}()
	ts.Defer(func() {
		server.Close()
		<-ended
	})
	ts.Setenv("BACKEND", listener.Addr().String())
}

// ProbeBackend reports what an edge might.
func (f *fakeServer) ProbeBackend(_ context.Context, req *resealv1.ProbeBackendRequest) (*resealv1.ProbeBackendResponse, error) {
	order := req.GetOrder()
	switch req.GetEdge() {
	case "edge-1":
	case "edge-2":
		return nil, status.Errorf(codes.FailedPrecondition, "edge %q: pool %q is not in its plan", req.GetEdge(), order.GetPool())
	default:
		return nil, status.Errorf(codes.NotFound, "edge %q: the edge is not connected to this replica", req.GetEdge())
	}
	const tls12, tls13 = resealv1.TLSVersion_TLS_VERSION_TLS1_2, resealv1.TLSVersion_TLS_VERSION_TLS1_3
	const yes, no = resealv1.ProbeAnswer_PROBE_ANSWER_YES, resealv1.ProbeAnswer_PROBE_ANSWER_NO
	return &resealv1.ProbeBackendResponse{Report: &resealv1.ProbeReport{
		Address: order.GetAddress(), ServerName: "jetty.internal", StartedAt: timestamppb.New(fakeEpoch),
		Took: durationpb.New(1234 * time.Millisecond), Alpn: "h2", Notes: []string{"one thing was not tried", "nor was another"},
		Versions: []*resealv1.ProbeVersion{
			{Version: tls12, Supported: true, CipherSuite: "SUITE12", Curve: "P256", Mechanism: resealv1.Mechanism_MECHANISM_SESSION_ID, SingleUse: no,
				WithoutTicketExtension: yes, EmptyTicket: true,
				Survives: []*resealv1.ProbeSurvival{
					{Ending: resealv1.ProbeEnding_PROBE_ENDING_CLOSE_NOTIFY, Answer: yes, Tried: 2, Resumed: 2},
					{Ending: resealv1.ProbeEnding_PROBE_ENDING_ABORT, Answer: no, Tried: 2, Note: "the answer is short"},
					{Ending: resealv1.ProbeEnding_PROBE_ENDING_IDLE, Answer: yes, Tried: 1, Resumed: 1, Note: "20s"},
				}},
			{Version: tls13, Error: "protocol version not supported"},
		},
		KeepAlive: &resealv1.ProbeKeepAlive{Reusable: yes, Status: 200, KeepAlive: "timeout=5", Idle: durationpb.New(5 * time.Second), Closed: true},
		Addresses: []*resealv1.ProbeAddress{
			{Address: "10.0.0.1:443", Certificate: strings.Repeat("ab", 32), Subject: "CN=jetty", Names: []string{"jetty.internal"}, ExpiresAt: timestamppb.New(fakeEpoch)},
			{Address: "10.0.0.2:443", Error: "connection refused"},
		},
		Shared: yes, Advice: "Do this. And that.",
		Connections: []*resealv1.ProbeConnection{
			{Number: 1, Address: "10.0.0.1:443", Purpose: "first", Offered: &resealv1.ProbeClientHello{Version: tls12, SessionId: "00000000"},
				Answered: &resealv1.ProbeServerHello{Version: tls12, SessionId: "11111111"}, Requests: 1,
				Ending: resealv1.ProbeEnding_PROBE_ENDING_CLOSE_NOTIFY, Close: resealv1.CloseKind_CLOSE_KIND_TIMEOUT},
			{Number: 2, Address: "10.0.0.2:443", Purpose: "again", Resumed: true,
				Offered:  &resealv1.ProbeClientHello{Version: tls12, SessionId: "11111111", SessionIdGiven: true, WithoutTicketExtension: true},
				Answered: &resealv1.ProbeServerHello{Version: tls12, SessionId: "11111111", Echoed: true},
				Ending:   resealv1.ProbeEnding_PROBE_ENDING_RESET, Close: resealv1.CloseKind_CLOSE_KIND_RESET_BY_US},
			{Number: 3, Address: "10.0.0.2:443", Purpose: "psk", Resumed: true, Tickets: 2,
				Offered:  &resealv1.ProbeClientHello{Version: tls13, Psk: "22222222"},
				Answered: &resealv1.ProbeServerHello{Version: tls13, Psk: true, Retried: true},
				Ending:   resealv1.ProbeEnding_PROBE_ENDING_PEER, Close: resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH},
			{Number: 4, Address: "10.0.0.2:443", Purpose: "broken", Error: "connection refused"},
		},
		Pool: &resealv1.BackendPool{Endpoints: []*resealv1.Endpoint{{Address: order.GetAddress()}},
			Tls: &resealv1.BackendTLS{ServerName: "jetty.internal"}, Connections: &resealv1.Connections{IdleTimeout: durationpb.New(4 * time.Second)}},
	}}, nil
}

// TestProbeShowsProgress: on a terminal there is something to see meanwhile.
func TestProbeShowsProgress(t *testing.T) {
	f := newFake(t)
	runToEnd(t, f, pool("jetty", "10.0.0.1:443"), "apply", "-f", "-")
	s := start(t, f, true, "", "probe", "10.0.0.1:443", "--edge", "edge-1", "--idle", "20s")
	s.ends(0)
	if got := s.err.String(); got != "Probing 10.0.0.1:443, with 20s of idling ...\r\x1b[K" {
		t.Errorf("stderr %q", got)
	}
}

// TestProbeIsInterrupted: Ctrl-C ends a probe at once.
func TestProbeIsInterrupted(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	s := start(t, newFake(t), false, "", "probe", silent.Addr().String())
	conn, err := silent.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s.stop()
	s.ends(1)
	if got := s.err.String(); got != "Error: interrupted\n" {
		t.Errorf("stderr %q", got)
	}
}

// TestProtoViewIsComplete: every field has its place, in JSON's types.
func TestProtoViewIsComplete(t *testing.T) {
	report := &resealv1.ProbeReport{Id: 1 << 60, Shared: 99, Versions: []*resealv1.ProbeVersion{{}},
		Pool: &resealv1.BackendPool{Retries: &resealv1.Retries{On: []resealv1.Retries_Condition{resealv1.Retries_CONDITION_502}},
			Connections: &resealv1.Connections{CloseTimeout: durationpb.New(90 * time.Second)}}}
	var out bytes.Buffer
	a := &app{console: console{out: &out}}
	if err := a.printDocument(&format{value: "json"}, protoView{report.ProtoReflect()}); err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(out.Bytes(), &fields); err != nil {
		t.Fatal(err)
	}
	if want := report.ProtoReflect().Descriptor().Fields().Len(); len(fields) != want {
		t.Errorf("%d fields, want %d", len(fields), want)
	}
	for _, want := range []string{`"id": 1152921504606846976`, `"shared": "unknown"`, `"took": null`, `"notes": []`, `"alpn": ""`,
		`"closeTimeout": "1m30s"`, `"502"`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%s is not in\n%s", want, &out)
		}
	}
	if strings.Contains(out.String(), "healthCheck") {
		t.Errorf("a spec shows what is not set:\n%s", &out)
	}
}
