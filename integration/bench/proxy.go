package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
)

// Proxy is a proxy under test, between the load's clients and one backend.
type Proxy interface {
	// Address is where clients connect.
	Address() string
	// Stop ends it with SIGTERM.
	Stop() error
	// Start starts it again after Stop and waits until it serves.
	Start(ctx context.Context) error
}

// target is what a proxy is put in front of.
type target struct {
	scenario  *Scenario
	backend   string // host:port
	authority *peers.Authority
	dir       string // for its files
}

// peer is HAProxy or nginx as a proxy.
type peer struct {
	address string
	probe   string // a plain port that answers when it is up
	config  process.Config
	running *process.Process
}

// Address implements Proxy.
func (p *peer) Address() string { return p.address }

// Start implements Proxy.
func (p *peer) Start(ctx context.Context) error {
	running, err := process.Start(p.config)
	if err != nil {
		return err
	}
	p.running = running
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := running.WaitReady(ctx, func(context.Context) error { return process.Listening(p.probe) }); err != nil {
		return errors.Join(err, running.Stop())
	}
	return nil
}

// Stop implements Proxy.
func (p *peer) Stop() error { return p.running.Stop() }

// prepare writes the files that both peers need and chooses their ports. site
// holds the certificate and key that clients see, authority what backends are
// verified with.
func (t target) prepare() (p *peer, site, authority string, err error) {
	p = &peer{}
	if p.address, err = process.FreeAddress(); err != nil {
		return nil, "", "", err
	}
	if p.probe, err = process.FreeAddress(); err != nil {
		return nil, "", "", err
	}
	pair, err := t.authority.Issue(siteNames...)
	if err != nil {
		return nil, "", "", err
	}
	if _, _, site, err = pair.Write(t.dir, "site"); err != nil {
		return nil, "", "", err
	}
	authority = filepath.Join(t.dir, "ca.crt")
	return p, site, authority, os.WriteFile(authority, t.authority.PEM(), 0o600)
}

// newHAProxy configures HAProxy as its manual says for re-encryption with reuse
// of connections. At best it sends no session_ticket extension, so that JSSE
// resumes by session ID, and keeps to TLS 1.2 with backends whose TLS 1.3 tickets
// are good once: nothing that it has lets it resume those.
func newHAProxy(t target, best bool) (Proxy, error) {
	p, certificate, authority, err := t.prepare()
	if err != nil {
		return nil, err
	}
	sni := "str(" + peers.ServerName + ")"
	if len(t.scenario.hosts()) > 1 {
		sni = "req.hdr(host)"
	}
	more := ""
	if best {
		more = " no-tls-tickets"
		if t.scenario.mode == peers.TLS13 {
			more += " ssl-max-ver TLSv1.2"
		}
	}
	config := filepath.Join(t.dir, "haproxy.cfg")
	text := fmt.Sprintf(`global
  nbthread 2
  maxconn 4096
  tune.ssl.default-dh-param 2048
defaults
  mode http
  option http-keep-alive
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  timeout http-keep-alive 60s
frontend up
  bind %s
  http-request return status 204
frontend site
  bind %s ssl crt %s
  default_backend service
backend service
  http-reuse always
  server service %s ssl verify required ca-file %s sni %s%s
`, p.probe, p.address, certificate, t.backend, authority, sni, more)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	p.config = process.Config{Path: "haproxy", Args: []string{"-db", "-f", config}}
	return p, nil
}

// newNginx configures nginx as its manual says for re-encryption with reuse of
// connections and sessions. Without a zone it fares worse: TLS 1.2 tickets then
// cost it a full handshake for 4 of 10 connections that the backend closes. What
// is best is the same as with HAProxy.
func newNginx(t target, best bool) (Proxy, error) {
	p, _, _, err := t.prepare()
	if err != nil {
		return nil, err
	}
	name := peers.ServerName
	if len(t.scenario.hosts()) > 1 {
		name = "$host"
	}
	protocols, more := "TLSv1.2 TLSv1.3", ""
	if best {
		more = "proxy_ssl_conf_command Options -SessionTicket;"
		if t.scenario.mode == peers.TLS13 {
			protocols = "TLSv1.2"
		}
	}
	// Workers of a root master would become nobody, who can't read the files.
	user := ""
	if os.Getuid() == 0 {
		user = "user root;\n"
	}
	config := filepath.Join(t.dir, "nginx.conf")
	text := user + fmt.Sprintf(`daemon off;
worker_processes 2;
pid nginx.pid;
error_log stderr error;
events { worker_connections 4096; }
http {
  access_log off;
  client_body_temp_path tmp-body; proxy_temp_path tmp-proxy; fastcgi_temp_path tmp-fastcgi;
  uwsgi_temp_path tmp-uwsgi; scgi_temp_path tmp-scgi;
  upstream service { zone service 1m; server %[1]s; keepalive 256; }
  server { listen %[2]s; return 204; }
  server {
    listen %[3]s ssl;
    ssl_certificate site.crt; ssl_certificate_key site.key;
    location / {
      proxy_pass https://service;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_ssl_session_reuse on;
      proxy_ssl_server_name on;
      proxy_ssl_name %[4]s;
      proxy_ssl_protocols %[5]s;
      %[6]s
      proxy_ssl_verify on;
      proxy_ssl_trusted_certificate ca.crt;
    }
  }
}
`, t.backend, p.probe, p.address, name, protocols, more)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	p.config = process.Config{Path: "nginx", Args: []string{"-p", t.dir + "/", "-c", config, "-e", "stderr"}}
	return p, nil
}

// versionOf is what a program says about its version, or "".
func versionOf(program string) string {
	path, err := process.Find(program, "")
	if err != nil {
		return ""
	}
	output, _ := exec.Command(path, "-v").CombinedOutput()
	found := regexp.MustCompile(`\d+\.\d+(\.\d+)?`).FindString(string(output))
	return strings.TrimSpace(found)
}
