package bench

import (
	"crypto/tls"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// TestLoad proves that the load tells good answers from bad ones: against a
// server that answers as handler says.
func TestLoad(t *testing.T) {
	good := peers.Handler(false)
	fail := func(every int64, bad http.HandlerFunc) http.Handler {
		var served atomic.Int64
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if served.Add(1)%every == 0 {
				bad(w, r)
				return
			}
			good.ServeHTTP(w, r)
		})
	}
	short := func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(peers.Body(peers.Small)[1:]) }
	cut := func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
	closes := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		good.ServeHTTP(w, r)
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "bad", code) }
	}
	tests := []struct {
		name    string
		handler http.Handler
		load    Load
		want    Outcome
		text    string // in the first error
	}{
		{"good", good, Load{}, Outcome{Done: 100}, ""},
		{"closes", fail(3, closes), Load{}, Outcome{Done: 100}, ""},
		{"aborts", good, Load{AbortEvery: 10, Path: peers.Medium}, Outcome{Done: 90, Aborted: 10}, ""},
		{"status", fail(10, status(500)), Load{}, Outcome{Done: 90, Failed: 10}, "status 500: bad"},
		{"retried status", fail(10, status(503)), Load{RetryUnavailable: true}, Outcome{Done: 100, Retried: 11}, ""},
		{"wrong body", fail(10, short), Load{}, Outcome{Done: 90, Failed: 10}, "1023 bytes"},
		{"connection lost", fail(1, cut), Load{}, Outcome{Failed: 100}, "EOF"},
		{"kept connection lost", fail(2, cut), Load{Clients: 1}, Outcome{Done: 100, Retried: 99}, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			authority, err := peers.NewAuthority("load test")
			if err != nil {
				t.Fatal(err)
			}
			server, err := peers.GoWith(peers.Options{Authority: authority, Mode: peers.TLS13}, test.handler)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = server.Stop() }()
			load := test.load
			load.Address, load.Requests, load.Hosts = server.Address, 100, []string{peers.ServerName}
			load.TLS = &tls.Config{RootCAs: authority.Pool(), MinVersion: tls.VersionTLS12}
			if load.Path == "" {
				load.Path = peers.Small
			}
			if load.Clients == 0 {
				load.Clients = 4
			}
			got, err := load.Run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if test.text != "" && (len(got.Errors) == 0 || !strings.Contains(got.Errors[0], test.text)) {
				t.Errorf("errors %q, want %q in them", got.Errors, test.text)
			}
			if done := got.Done > 0; done != (got.P50 > 0) || got.P50 > got.P99 || got.P99 > got.Took {
				t.Errorf("p50 %v and p99 %v of %v", got.P50, got.P99, got.Took)
			}
			if got.Done != test.want.Done || got.Aborted != test.want.Aborted || got.Failed != test.want.Failed || got.Retried != test.want.Retried {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

// TestLoadRefused makes requests where nobody listens.
func TestLoadRefused(t *testing.T) {
	address, err := process.FreeAddress()
	if err != nil {
		t.Fatal(err)
	}
	load := Load{Address: address, TLS: &tls.Config{}, Hosts: []string{siteName}, Path: peers.Small, Requests: 3, Clients: 1}
	got, err := load.Run(t.Context())
	if err != nil || got.Failed != 3 || got.Retried != 0 {
		t.Errorf("without retries: %+v, %v, want 3 failures", got, err)
	}
}
