package plan

import (
	"errors"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestCompile(t *testing.T) {
	ca := newAuthority(t)
	chain, key, _ := ca.issue(leafOptions{names: []string{"app.test"}})
	p := mustCompile(t,
		named("cert", &resealv1.Certificate{CertificatePem: chain, PrivateKeyPem: key}),
		named("b", &resealv1.Listener{Address: ":8444", Certificates: []string{"cert"}, Pool: "web"}),
		named("a", &resealv1.Listener{Address: ":8443", Certificates: []string{"cert"}}),
		named("web", pool("10.0.0.1:443")),
		named("shop", &resealv1.Route{Listeners: []string{"a", "on-another-edge"}, Hosts: []string{"shop.test"}, Pools: pools("web")}),
		named("elsewhere", &resealv1.Route{Listeners: []string{"on-another-edge"}, Pools: pools("not-sent-here")}),
	)
	if p.Revision != 7 || len(p.Pools) != 1 || p.Pools["web"].UID != "uid-web" {
		t.Errorf("revision %d, pools %v", p.Revision, p.Pools)
	}
	if names := []string{p.Listeners[0].Name, p.Listeners[1].Name}; !slices.Equal(names, []string{"a", "b"}) {
		t.Errorf("listeners %v", names)
	}
	a, b := p.Listeners[0], p.Listeners[1]
	if a.TicketLifetime != 12*time.Hour || a.TLS.SessionTicketsDisabled {
		t.Error("resumption is not on with 12h by default")
	}
	if m, ok := a.Route("shop.test", "/x"); !ok || m.Pool != "web" || m.Route != "shop" {
		t.Errorf("a: shop.test: %+v %v", m, ok)
	}
	if _, ok := a.Route("other.test", "/x"); ok {
		t.Error("a has no pool of its own, yet other.test matches")
	}
	if m, ok := b.Route("other.test", "/x"); !ok || m.Pool != "web" || m.Route != "" {
		t.Errorf("b: other.test: %+v %v", m, ok)
	}
	for host, want := range map[string]bool{"shop.test": true, "app.test": true, "other.test": false, "": false} {
		if a.AllowsHost(host) != want {
			t.Errorf("AllowsHost(%q) is not %v", host, want)
		}
	}
	if b.AllowsHost("shop.test") {
		t.Error("b allows a host of a route that it does not serve")
	}
}

func TestCompileRefuses(t *testing.T) {
	ca := newAuthority(t)
	chain, key, _ := ca.issue(leafOptions{names: []string{"app.test"}})
	_, otherKey, _ := ca.issue(leafOptions{names: []string{"app.test"}})
	cert := func() *resealv1.Resource {
		return named("cert", &resealv1.Certificate{CertificatePem: chain, PrivateKeyPem: key})
	}
	listener := func(change func(*resealv1.Listener)) *resealv1.Resource {
		l := &resealv1.Listener{Address: ":8443", Certificates: []string{"cert"}, Pool: "web"}
		change(l)
		return named("web", l)
	}
	web := func(change func(*resealv1.BackendPool)) *resealv1.Resource {
		p := pool("10.0.0.1:443")
		change(p)
		return named("web", p)
	}
	route := func(change func(*resealv1.Route)) []*resealv1.Resource {
		r := &resealv1.Route{Listeners: []string{"web"}, Pools: pools("web")}
		change(r)
		return []*resealv1.Resource{cert(), named("web", pool("10.0.0.1:443")), listener(func(*resealv1.Listener) {}), named("r", r)}
	}
	with := func(rs ...*resealv1.Resource) []*resealv1.Resource { return rs }
	policy := func(change func(*resealv1.TLSPolicy)) []*resealv1.Resource {
		p := &resealv1.TLSPolicy{}
		change(p)
		return with(named("strict", p), web(func(p *resealv1.BackendPool) { p.Tls = &resealv1.BackendTLS{Policy: "strict"} }))
	}
	zero := uint32(0)
	tests := []struct {
		name      string
		resources []*resealv1.Resource
		want      []string // "Kind/name: path" of each violation, in order
	}{
		{"unknown certificate", with(web(func(*resealv1.BackendPool) {}), listener(func(*resealv1.Listener) {})),
			[]string{"Listener/web: spec.certificates[0]"}},
		{"no certificate", with(web(func(*resealv1.BackendPool) {}), listener(func(l *resealv1.Listener) { l.Certificates = nil })),
			[]string{"Listener/web: spec.certificates"}},
		{"unknown pool and policy", with(cert(), listener(func(l *resealv1.Listener) { l.TlsPolicy = "gone" })),
			[]string{"Listener/web: spec.tlsPolicy", "Listener/web: spec.pool"}},
		{"wrong key", with(named("cert", &resealv1.Certificate{CertificatePem: chain, PrivateKeyPem: otherKey}), web(func(*resealv1.BackendPool) {}), listener(func(*resealv1.Listener) {})),
			[]string{"Certificate/cert: spec.privateKeyPem"}},
		{"redacted key", with(named("cert", &resealv1.Certificate{CertificatePem: chain, PrivateKeyPem: resealv1.SecretMarker}), web(func(*resealv1.BackendPool) {}), listener(func(*resealv1.Listener) {})),
			[]string{"Certificate/cert: spec.privateKeyPem"}},
		{"no chain", with(named("cert", &resealv1.Certificate{CertificatePem: "x", PrivateKeyPem: key}), web(func(*resealv1.BackendPool) {}), listener(func(*resealv1.Listener) {})),
			[]string{"Certificate/cert: spec.certificatePem"}},
		{"missing files", with(named("cert", &resealv1.Certificate{CertificateFile: "/c", PrivateKeyFile: "/k"}), web(func(*resealv1.BackendPool) {}), listener(func(*resealv1.Listener) {})),
			[]string{"Certificate/cert: spec.certificateFile", "Certificate/cert: spec.privateKeyFile"}},
		{"PEM and files", with(named("cert", &resealv1.Certificate{CertificatePem: chain, PrivateKeyFile: "/k"}), web(func(*resealv1.BackendPool) {}), listener(func(*resealv1.Listener) {})),
			[]string{"Certificate/cert: spec.privateKeyFile"}},
		{"bad listener", with(cert(), web(func(*resealv1.BackendPool) {}), listener(func(l *resealv1.Listener) {
			l.Address = "8443"
			l.ProxyProtocol = &resealv1.ProxyProtocol{TrustedCidrs: []string{"10.0.0.0/8", "10.0.0.1"}}
			l.Forwarded = &resealv1.Forwarded{TrustedCidrs: []string{"ten"}}
			l.Timeouts = &resealv1.ListenerTimeouts{Idle: durationpb.New(-time.Second)}
		})), []string{"Listener/web: spec.timeouts.idle", "Listener/web: spec.address", "Listener/web: spec.proxyProtocol.trustedCIDRs[1]",
			"Listener/web: spec.forwarded.trustedCIDRs[0]"}},
		{"certificates that nobody asks for", with(cert(), web(func(*resealv1.BackendPool) {}), listener(func(l *resealv1.Listener) {
			l.ClientCertificate = &resealv1.ClientCertificate{Forward: resealv1.ClientCertificate_FORWARD_XFCC}
		})), []string{"Listener/web: spec.clientCertificate.forward"}},
		{"headers that can't be removed or kept", with(cert(), web(func(*resealv1.BackendPool) {}), listener(func(l *resealv1.Listener) {
			l.Forwarded = &resealv1.Forwarded{RemoveHeaders: []string{"Host"}, KeepHeaders: []string{"Client-Cert"}}
		})), []string{"Listener/web: spec.forwarded.removeHeaders[0]", "Listener/web: spec.forwarded.keepHeaders[0]"}},
		{"two listeners on an address", with(cert(), web(func(*resealv1.BackendPool) {}), listener(func(*resealv1.Listener) {}),
			named("xeb", &resealv1.Listener{Address: ":8443", Certificates: []string{"cert"}, Pool: "web"})),
			[]string{"Listener/xeb: spec.address"}},
		{"tls listener to http pool", with(cert(), web(func(*resealv1.BackendPool) {}), listener(func(l *resealv1.Listener) { l.Protocol = resealv1.Listener_PROTOCOL_TLS })),
			[]string{"Listener/web: spec.pool"}},
		{"https listener to tcp pool", with(cert(), web(func(p *resealv1.BackendPool) { p.Protocol = resealv1.BackendPool_PROTOCOL_TCP }), listener(func(*resealv1.Listener) {})),
			[]string{"Listener/web: spec.pool"}},
		{"tls listener without pool", with(cert(), listener(func(l *resealv1.Listener) { l.Protocol = resealv1.Listener_PROTOCOL_TLS; l.Pool = "" })),
			[]string{"Listener/web: spec.pool"}},
		{"no endpoints", with(named("web", &resealv1.BackendPool{})), []string{"BackendPool/web: spec"}},
		{"bad pool", with(web(func(p *resealv1.BackendPool) {
			p.Endpoints = append(p.Endpoints, &resealv1.Endpoint{Address: "10.0.0.1"}, &resealv1.Endpoint{Address: ":443"}, &resealv1.Endpoint{Address: "x:0"})
			p.HealthCheck = &resealv1.HealthCheck{Path: "up"}
			p.Timeouts = &resealv1.BackendTimeouts{Connect: durationpb.New(0)}
			p.Tls = &resealv1.BackendTLS{
				ServerName: "a b", ClientCertificate: "gone", Policy: "gone", SubjectAltNames: []string{"ok.test", "not ok"},
				Trust: &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaPem{CaPem: "junk"}},
			}
		})), []string{"BackendPool/web: spec.timeouts.connect",
			"BackendPool/web: spec.endpoints[1].address", "BackendPool/web: spec.endpoints[2].address", "BackendPool/web: spec.endpoints[3].address",
			"BackendPool/web: spec.tls.serverName", "BackendPool/web: spec.tls.trust.caPem", "BackendPool/web: spec.tls.subjectAltNames[1]",
			"BackendPool/web: spec.healthCheck.path", "BackendPool/web: spec.tls.policy", "BackendPool/web: spec.tls.clientCertificate"}},
		{"health check without a name", with(web(func(p *resealv1.BackendPool) { p.HealthCheck = &resealv1.HealthCheck{} })),
			[]string{"BackendPool/web: spec.healthCheck.serverName"}},
		{"caFile missing", with(web(func(p *resealv1.BackendPool) {
			p.Tls = &resealv1.BackendTLS{Trust: &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaFile{CaFile: "/ca.pem"}}}
		})), []string{"BackendPool/web: spec.tls.trust.caFile"}},
		{"bad policy", policy(func(p *resealv1.TLSPolicy) {
			p.MinVersion, p.MaxVersion = resealv1.TLSVersion_TLS_VERSION_TLS1_3, resealv1.TLSVersion_TLS_VERSION_TLS1_2
			p.CipherSuites = []string{"TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "TLS_AES_128_GCM_SHA256", "ECDHE-RSA-AES128"}
			p.Curves = []string{"P256", "P257"}
			p.Alpn = []string{"h3"}
			p.Resumption = &resealv1.Resumption{TicketLifetime: durationpb.New(200 * time.Hour)}
			p.ClientAuth = &resealv1.ClientAuth{Mode: resealv1.ClientAuth_MODE_REQUIRE}
		}), []string{"TLSPolicy/strict: spec.minVersion", "TLSPolicy/strict: spec.cipherSuites[1]", "TLSPolicy/strict: spec.cipherSuites[2]",
			"TLSPolicy/strict: spec.curves[1]", "TLSPolicy/strict: spec.resumption.ticketLifetime", "TLSPolicy/strict: spec.clientAuth.caPem"}},
		{"foreign revocation list", policy(func(p *resealv1.TLSPolicy) {
			p.ClientAuth = &resealv1.ClientAuth{Mode: resealv1.ClientAuth_MODE_OPTIONAL, CaPem: ca.pem, CrlPem: newAuthority(t).revoke()}
		}), []string{"TLSPolicy/strict: spec.clientAuth.crlPem"}},
		{"unknown enum", policy(func(p *resealv1.TLSPolicy) { p.MaxVersion = 9 }), []string{"TLSPolicy/strict: spec.maxVersion"}},
		{"bad route", route(func(r *resealv1.Route) {
			r.Hosts = []string{"ok.test", "*.ok.test", "No.test", "*", "a.*.test", "h:1"}
			r.Paths = []*resealv1.PathMatch{prefix("/ok"), prefix("nok"), exact(""), {}}
			r.Pools = append(r.Pools, &resealv1.WeightedPool{Name: "gone"})
			r.RequestHeaders = &resealv1.HeaderEdits{Remove: []string{"X-Ok", "a b", "Connection"}}
			r.ResponseHeaders = &resealv1.HeaderEdits{Set: map[string]string{"X-A": "a\nb"}}
			r.Timeouts = &resealv1.RouteTimeouts{Request: durationpb.New(0)}
		}), []string{"Route/r: spec.timeouts.request", "Route/r: spec.hosts[2]", "Route/r: spec.hosts[3]", "Route/r: spec.hosts[4]", "Route/r: spec.hosts[5]",
			"Route/r: spec.paths[1].prefix", "Route/r: spec.paths[2].exact", "Route/r: spec.paths[3]",
			"Route/r: spec.requestHeaders.remove[1]", "Route/r: spec.requestHeaders.remove[2]", `Route/r: spec.responseHeaders.set["X-A"]`, "Route/r: spec.pools[1].name"}},
		{"no weight", route(func(r *resealv1.Route) { r.Pools[0].Weight = &zero }), []string{"Route/r: spec.pools"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p, violations := Compile(resealv1.NewSnapshot("c", 1, test.resources), Env{ReadFile: func(name string) ([]byte, error) {
				return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
			}})
			if p != nil {
				t.Error("got a plan to serve")
			}
			var got []string
			for _, v := range violations {
				got = append(got, v.Resource.Key()+": "+v.Field)
				if v.Description == "" || strings.Contains(v.Description, "%!") || strings.Contains(v.Description, "PRIVATE KEY-") {
					t.Errorf("description %q", v.Description)
				}
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("got  %q\nwant %q", got, test.want)
			}
		})
	}
}

func TestFiles(t *testing.T) {
	ca := newAuthority(t)
	chain, key, _ := ca.issue(leafOptions{names: []string{"app.test"}})
	content := map[string]string{"/ca": ca.pem, "/chain": chain, "/key": key}
	var reads atomic.Int64
	env := Env{ReadFile: func(name string) ([]byte, error) {
		reads.Add(1)
		if data, ok := content[name]; ok {
			return []byte(data), nil
		}
		return nil, errors.New("no such file")
	}}
	fromFile := func() *resealv1.BackendPool {
		p := pool("10.0.0.1:443")
		p.Tls = &resealv1.BackendTLS{Trust: &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaFile{CaFile: "/ca"}}}
		return p
	}
	inline := pool("10.0.0.1:443")
	inline.Tls = &resealv1.BackendTLS{Trust: &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaPem{CaPem: ca.pem}}}
	s := resealv1.NewSnapshot("c", 1, []*resealv1.Resource{
		named("cert", &resealv1.Certificate{CertificateFile: "/chain", PrivateKeyFile: "/key"}),
		named("unused", &resealv1.Certificate{CertificateFile: "/not-here", PrivateKeyFile: "/not-here"}),
		named("l", &resealv1.Listener{Address: ":1", Certificates: []string{"cert"}}),
		named("one", fromFile()), named("two", fromFile()), named("inline", inline),
	})
	draft := NewDraft(s, nil, env, nil)
	p := draft.Compile()
	files := func(d *Draft) []string { return slices.Sorted(maps.Keys(d.Files())) }
	if len(draft.Violations()) > 0 || !slices.Equal(files(draft), []string{"/ca", "/chain", "/key", "/not-here"}) || reads.Load() != 4 {
		t.Errorf("files %v after %d reads, violations %v", files(draft), reads.Load(), draft.Violations())
	}
	if p.Pools["one"].Identity != p.Pools["inline"].Identity {
		t.Error("the identity depends on where the roots come from, not on their content")
	}
	delete(content, "/key")
	broken := NewDraft(s, nil, env, nil)
	if broken.Compile(); len(broken.Violations()) != 1 || !slices.Equal(files(broken), files(draft)) {
		t.Errorf("files %v with violations %v: a mended file would not be noticed", files(broken), broken.Violations())
	}
	content["/key"] = key
	content["/ca"] = newAuthority(t).pem
	changed, _ := Compile(s, env)
	if changed.Pools["one"].Identity == p.Pools["one"].Identity {
		t.Error("other roots in the file, same identity")
	}
}

func TestExpiredCertificateServes(t *testing.T) {
	ca := newAuthority(t)
	chain, key, _ := ca.issue(leafOptions{names: []string{"app.test"}, expiry: -time.Minute})
	p := mustCompile(t, named("cert", &resealv1.Certificate{CertificatePem: chain, PrivateKeyPem: key}),
		named("l", &resealv1.Listener{Address: ":1", Certificates: []string{"cert"}}))
	if len(p.Warnings) != 1 || p.Warnings[0].Field != "spec.certificatePem" || !strings.Contains(p.Warnings[0].Description, "expired on") {
		t.Errorf("warnings %v", p.Warnings)
	}
}

func TestIdentity(t *testing.T) {
	ca := newAuthority(t)
	chain, key, _ := ca.issue(leafOptions{client: true})
	base := func() *resealv1.BackendPool {
		p := pool("10.0.0.1:443")
		p.Tls = &resealv1.BackendTLS{Trust: &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaPem{CaPem: ca.pem}}}
		return p
	}
	identity := func(change func(*resealv1.BackendPool)) string {
		p := base()
		change(p)
		plan := mustCompile(t, named("p", p), named("client", &resealv1.Certificate{CertificatePem: chain, PrivateKeyPem: key}),
			named("tls13", &resealv1.TLSPolicy{MinVersion: resealv1.TLSVersion_TLS_VERSION_TLS1_3}),
			named("curve", &resealv1.TLSPolicy{Curves: []string{"P256"}}),
			named("tickets", &resealv1.TLSPolicy{Resumption: &resealv1.Resumption{TicketLifetime: durationpb.New(time.Hour)}}))
		return plan.Pools["p"].Identity
	}
	want := identity(func(*resealv1.BackendPool) {})
	same := map[string]func(*resealv1.BackendPool){
		"endpoint":        func(p *resealv1.BackendPool) { p.Endpoints[0].Address = "10.0.0.2:443" },
		"SNI":             func(p *resealv1.BackendPool) { p.Tls.ServerName = "x.test" },
		"load balancing":  func(p *resealv1.BackendPool) { p.LoadBalancing = &resealv1.LoadBalancing{HashOn: "host"} },
		"frontend policy": func(p *resealv1.BackendPool) { p.Tls.Policy = "tickets" },
		"roots twice": func(p *resealv1.BackendPool) {
			p.Tls.Trust.Roots = &resealv1.BackendTLS_Trust_CaPem{CaPem: ca.pem + ca.pem}
		},
	}
	for name, change := range same {
		if identity(change) != want {
			t.Errorf("%s changes the identity", name)
		}
	}
	seen := map[string]string{want: "the base"}
	for name, change := range map[string]func(*resealv1.BackendPool){
		"protocol":           func(p *resealv1.BackendPool) { p.Protocol = resealv1.BackendPool_PROTOCOL_HTTP1 },
		"system roots":       func(p *resealv1.BackendPool) { p.Tls.Trust = nil },
		"names":              func(p *resealv1.BackendPool) { p.Tls.SubjectAltNames = []string{"a.test"} },
		"skip verify":        func(p *resealv1.BackendPool) { p.Tls.InsecureSkipVerify = true },
		"client certificate": func(p *resealv1.BackendPool) { p.Tls.ClientCertificate = "client" },
		"common name":        func(p *resealv1.BackendPool) { p.Tls.SubjectCommonName = true },
		"renegotiation": func(p *resealv1.BackendPool) {
			p.Tls.Renegotiation = resealv1.BackendTLS_RENEGOTIATION_ONCE
		},
		"renegotiation, tcp": func(p *resealv1.BackendPool) {
			p.Protocol, p.Tls.Renegotiation = resealv1.BackendPool_PROTOCOL_TCP, resealv1.BackendTLS_RENEGOTIATION_ONCE
		},
		"version": func(p *resealv1.BackendPool) { p.Tls.Policy = "tls13" },
		"curve":   func(p *resealv1.BackendPool) { p.Tls.Policy = "curve" },
	} {
		got := identity(change)
		if other, ok := seen[got]; ok {
			t.Errorf("%s has the identity of %s", name, other)
		}
		seen[got] = name
	}
}

func TestPolicyKey(t *testing.T) {
	ca := newAuthority(t)
	key := func(change func(*resealv1.TLSPolicy, *resealv1.Listener)) string {
		chain, key, _ := ca.issue(leafOptions{names: []string{"app.test"}}) // renewed each time
		policy, listener := &resealv1.TLSPolicy{}, &resealv1.Listener{Address: ":1", Certificates: []string{"cert"}, TlsPolicy: "p"}
		change(policy, listener)
		return mustCompile(t, named("cert", &resealv1.Certificate{CertificatePem: chain, PrivateKeyPem: key}),
			named("l", listener), named("p", policy)).Listeners[0].PolicyKey
	}
	want := key(func(*resealv1.TLSPolicy, *resealv1.Listener) {})
	if key(func(p *resealv1.TLSPolicy, l *resealv1.Listener) {
		p.MinVersion, l.Address = resealv1.TLSVersion_TLS_VERSION_TLS1_3, ":2"
	}) != want {
		t.Error("a renewed certificate, another address or version would cost sessions")
	}
	auth := &resealv1.ClientAuth{Mode: resealv1.ClientAuth_MODE_REQUIRE, CaPem: ca.pem}
	keys := map[string]bool{want: true}
	for _, change := range []func(*resealv1.TLSPolicy, *resealv1.Listener){
		func(p *resealv1.TLSPolicy, _ *resealv1.Listener) { p.ClientAuth = auth },
		func(p *resealv1.TLSPolicy, _ *resealv1.Listener) {
			p.ClientAuth = &resealv1.ClientAuth{Mode: resealv1.ClientAuth_MODE_OPTIONAL, CaPem: ca.pem}
		},
		func(p *resealv1.TLSPolicy, _ *resealv1.Listener) {
			p.ClientAuth = &resealv1.ClientAuth{Mode: resealv1.ClientAuth_MODE_REQUIRE, CaPem: newAuthority(t).pem}
		},
		func(p *resealv1.TLSPolicy, _ *resealv1.Listener) {
			p.ClientAuth = &resealv1.ClientAuth{Mode: resealv1.ClientAuth_MODE_REQUIRE, CaPem: ca.pem, CrlPem: ca.revoke()}
		},
		func(p *resealv1.TLSPolicy, _ *resealv1.Listener) {
			p.Resumption = &resealv1.Resumption{Keyring: "other"}
		},
		func(_ *resealv1.TLSPolicy, l *resealv1.Listener) { l.TlsPolicy = "" },
	} {
		got := key(change)
		if keys[got] {
			t.Error("two client authentications share tickets")
		}
		keys[got] = true
	}
}
