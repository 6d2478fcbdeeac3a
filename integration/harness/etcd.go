package harness

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"github.com/reseal/reseal/integration/process"
)

// Etcd is a cluster of real etcd members, with mutual TLS for clients and
// between members.
type Etcd struct {
	// Members are the processes, by number.
	Members []*process.Process

	site                  *Site
	clients, peers        []string // addresses
	certFile, keyFile, ca string
	joined                string
	page                  *http.Client
}

// StartEtcd starts a cluster that ends with the test, and waits until it serves.
// It skips the test when etcd is not installed.
func (s *Site) StartEtcd(members int) *Etcd {
	s.TB.Helper()
	Need(s.TB, "etcd")
	e := &Etcd{site: s, Members: make([]*process.Process, members)}
	pair, err := s.Authority.Issue("localhost", "127.0.0.1")
	if err != nil {
		s.TB.Fatal(err)
	}
	if e.certFile, e.keyFile, _, err = pair.Write(s.Dir, "etcd"); err != nil {
		s.TB.Fatal(err)
	}
	e.ca = s.WriteFile("etcd-ca.pem", string(s.Authority.PEM()))
	var joined []string
	for i := range e.Members {
		e.clients, e.peers = append(e.clients, s.Address()), append(e.peers, s.Address())
		joined = append(joined, fmt.Sprintf("m%d=https://%s", i, e.peers[i]))
	}
	e.joined = strings.Join(joined, ",")
	certificate, err := pair.TLS()
	if err != nil {
		s.TB.Fatal(err)
	}
	e.page = &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: s.Authority.Pool(), Certificates: []tls.Certificate{certificate}},
	}}
	for i := range e.Members {
		e.Start(i)
	}
	for i := range e.Members {
		e.Ready(i)
	}
	return e
}

// Start starts a member, again.
func (e *Etcd) Start(i int) {
	tb := e.site.TB
	tb.Helper()
	args := []string{
		"--name", fmt.Sprintf("m%d", i), "--data-dir", filepath.Join(e.site.Dir, fmt.Sprintf("etcd-%d", i)),
		"--listen-client-urls", "https://" + e.clients[i], "--advertise-client-urls", "https://" + e.clients[i],
		"--listen-peer-urls", "https://" + e.peers[i], "--initial-advertise-peer-urls", "https://" + e.peers[i],
		"--initial-cluster", e.joined, "--initial-cluster-token", "reseal-test",
		"--client-cert-auth", "--trusted-ca-file", e.ca, "--cert-file", e.certFile, "--key-file", e.keyFile,
		"--peer-client-cert-auth", "--peer-trusted-ca-file", e.ca, "--peer-cert-file", e.certFile, "--peer-key-file", e.keyFile,
		"--heartbeat-interval", "50", "--election-timeout", "500",
	}
	member, err := process.Start(process.Config{Name: fmt.Sprintf("etcd m%d", i), Path: "etcd", Args: args})
	if err != nil {
		tb.Fatal(err)
	}
	e.Members[i] = member
	tb.Cleanup(func() {
		if err := member.Stop(); err != nil {
			tb.Error(err)
		}
		if tb.Failed() {
			tb.Logf("%s printed:\n%s", member.Name(), member.Output())
		}
	})
}

// Ready waits until a member serves and the cluster has a leader.
func (e *Etcd) Ready(i int) {
	tb := e.site.TB
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := e.Members[i].WaitReady(ctx, func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+e.clients[i]+"/health", nil)
		if err != nil {
			return err
		}
		response, err := e.page.Do(request)
		if err != nil {
			return err
		}
		defer func() { _ = response.Body.Close() }()
		var health struct{ Health string }
		if err := json.NewDecoder(response.Body).Decode(&health); err != nil {
			return err
		}
		if health.Health != "true" {
			return fmt.Errorf("/health says %q", health.Health)
		}
		return nil
	}); err != nil {
		tb.Fatal(err)
	}
}

// Flags point a control plane at the cluster.
func (e *Etcd) Flags() []string {
	var urls []string
	for _, address := range e.clients {
		urls = append(urls, "https://"+address)
	}
	return []string{"--etcd-endpoints", strings.Join(urls, ","), "--etcd-ca", e.ca, "--etcd-cert", e.certFile, "--etcd-key", e.keyFile}
}
