package manifest

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/durationpb"
)

// violationsOf validates a spec written in YAML and returns "path: description".
func violationsOf(t *testing.T, kind, spec string) []string {
	t.Helper()
	indented := "  " + strings.ReplaceAll(strings.TrimSpace(spec), "\n", "\n  ")
	text := fmt.Sprintf("apiVersion: reseal/v1\nkind: %s\nmetadata: {name: x}\nspec:\n%s\n", kind, indented)
	objects, err := parse("f", []byte(text), false)
	if err != nil {
		t.Fatalf("%v in\n%s", err, text)
	}
	return describe(Validate(objects[0].Resource))
}

func describe(violations []*resealv1.Violation) []string {
	var lines []string
	for _, violation := range violations {
		lines = append(lines, violation.Field+": "+violation.Description)
	}
	return lines
}

func yamlPEM(field, text string) string {
	return field + ": |\n  " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n  ") + "\n"
}

func TestValidateAccepts(t *testing.T) {
	ca := newAuthority(t)
	for _, test := range []struct{ kind, spec string }{
		{"BackendPool", "dns: {name: my_backend.internal., port: 65535, refreshInterval: 1s}"},
		{"BackendPool", "endpoints: [{address: 'a:1', weight: 1000}, {address: '[fe80::1%eth0]:443'}, {address: 'WEB.example:443'}]"},
		{"BackendPool", "endpoints: [{address: 'a:1'}]\ntls: {renegotiation: once, subjectCommonName: true}"},
		{"BackendPool", "endpoints: [{address: 'a:1'}]\nprotocol: http2\ntls: {renegotiation: never}"},
		{"BackendPool", "endpoints: [{address: 'a:1'}]\ntls: {serverName: 10.0.0.1, subjectAltNames: ['spiffe://td/web', 'urn:x:y', 10.0.0.1, '::1', web.example], trust: {caFile: /etc/ca.pem}}\nhealthCheck: {path: '/a%20b', method: HEAD, expectedStatuses: [200, 599], interval: 100ms}"},
		{"BackendPool", "endpoints: [{address: 'a:1'}]\nloadBalancing: {algorithm: ring_hash, hashOn: 'header:X-User'}\nretries: {attempts: 5, on: [502]}\nsessions: {coalesceTimeout: 0s}\nconnections: {closeTimeout: 0s}"},
		{"BackendPool", "endpoints: [{address: 'a:1'}]\nprotocol: tcp\nhealthCheck: {serverName: web.example}\nloadBalancing: {hashOn: source_ip}"},
		{"BackendPool", "endpoints: [{address: 'a:1'}]\ntls:\n  trust:\n    " + strings.ReplaceAll(yamlPEM("caPem", ca.certPEM+ca.certPEM), "\n", "\n    ")},
		{"TLSPolicy", "minVersion: tls1.3\ncipherSuites: [TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]\ncurves: [X25519MLKEM768, P256]\nalpn: [h2, http/1.1]\nresumption: {ticketLifetime: 168h}"},
		{"TLSPolicy", "clientAuth:\n  mode: require\n  " + strings.ReplaceAll(yamlPEM("caPem", ca.certPEM)+yamlPEM("crlPem", ca.revocationList), "\n", "\n  ")},
		{"Listener", "address: ':443'\ncertificates: [c]\nforwarded: {trustedCIDRs: [10.0.0.0/8, '2001:db8::/32']}\nproxyProtocol: {trustedCIDRs: [127.0.0.1/32]}\ntimeouts: {drain: 0s}\nedgeSelector: {matchLabels: {zone: a, 'x.y/z': ''}}"},
		{"Listener", "address: '[::]:443'\ncertificates: [c]\nprotocol: tls\npool: p"},
		{"Listener", "address: ':443'\ncertificates: [c]\nclientCertificate: {forward: rfc9440}\nforwarded: {removeHeaders: [X-Auth-*, X-User, x-real-ip, Te-X], keepHeaders: [X-SSL-Client-*, x_ssl_client_dn, x-forwarded-*, X-Forwarded-Client-Cert, Forwarded, X-Forwarded-For]}"},
		{"Listener", "address: ':443'\ncertificates: [c]\nclientCertificate: {forward: xfcc}\nforwarded: {keepHeaders: [X-Forwarded-*]}"},
		{"Route", "listeners: [l]\nhosts: ['*.example.com', example.com, 10.0.0.1, '::1']\npaths: [{prefix: /}, {exact: /a}, {prefix: /a}]\npools: [{name: p}, {name: q, weight: 0}]\nrequestHeaders: {set: {X-A: b}, add: {X-A: ''}, remove: [X-B]}\ntimeouts: {request: 1s}"},
		{"Certificate", "certificateFile: /c.pem\nprivateKeyFile: /k.pem"},
		{"Certificate", yamlPEM("certificatePem", ca.certPEM)},
		{"Certificate", yamlPEM("certificatePem", "leaf\n"+ca.certPEM+"and its issuer\n"+ca.certPEM) + yamlPEM("privateKeyPem", ca.pkcs8)},
		{"Certificate", yamlPEM("certificatePem", ca.certPEM) + yamlPEM("privateKeyPem", pemText("EC PARAMETERS", []byte{6, 0})+ca.sec1)},
		{"Keyring", "rotationInterval: 1m\nretireAfter: 0s\nmaxActiveAge: 1m"},
		{"Keyring", "{}"},
	} {
		if got := violationsOf(t, test.kind, test.spec); got != nil {
			t.Errorf("%s %s:\n%s", test.kind, test.spec, strings.Join(got, "\n"))
		}
	}
}

func TestValidateBackendPool(t *testing.T) {
	const ok = "endpoints: [{address: 'a:1'}]\n"
	for _, test := range []struct {
		spec string
		want []string
	}{
		{"protocol: auto", []string{"spec: has neither endpoints nor dns; set one of them"}},
		{ok + "dns: {name: b, port: 1}", []string{"spec.dns: endpoints and dns are both set; remove one of them"}},
		{"endpoints: [{address: 10.0.0.1}, {address: ''}, {}, {address: 'https://a'}, {address: '::1'}, {address: ':1'}, {address: 'a:b:c'}, {address: 'a:0'}, {address: 'a:https'}, {address: 'a:65536'}, {address: 'a b:1'}, {address: '10.0.0.256:1'}, {address: 'c:1', weight: 1001}, {address: 'C:1'}]", []string{
			`spec.endpoints[0].address: "10.0.0.1" has no port`,
			`spec.endpoints[1].address: is missing; it must be host:port`,
			`spec.endpoints[2].address: is missing; it must be host:port`,
			`spec.endpoints[3].address: "https://a" is a URL; write host:port`,
			`spec.endpoints[4].address: "::1" has no port; write [::1]:443`,
			`spec.endpoints[5].address: ":1" has no host`,
			`spec.endpoints[6].address: "a:b:c" is not host:port; an IPv6 address stands in brackets, as in [2001:db8::1]:443`,
			`spec.endpoints[7].address: "a:0": the port must be a number from 1 to 65535`,
			`spec.endpoints[8].address: "a:https": the port must be a number from 1 to 65535`,
			`spec.endpoints[9].address: "a:65536": the port must be a number from 1 to 65535`,
			`spec.endpoints[10].address: "a b" is not a host name`,
			`spec.endpoints[11].address: "10.0.0.256" is neither an IP address nor a host name`,
			`spec.endpoints[12].weight: 1001 is above the maximum, 1000`,
			`spec.endpoints[13].address: "C:1" is there twice, first as endpoint 12; give one endpoint more weight instead`,
		}},
		{"dns: {name: 10.0.0.1, refreshInterval: 999ms}", []string{
			`spec.dns.name: "10.0.0.1" is neither an IP address nor a host name`,
			"spec.dns.port: 0 is not a port; it must be 1 to 65535",
			"spec.dns.refreshInterval: 999ms is below the minimum, 1s",
		}},
		{ok + "tls: {serverName: Web.example., trust: {system: false}, subjectAltNames: [a, a, 'b:443', '*.*'], clientCertificate: A, policy: b/c}", []string{
			`spec.tls.serverName: "Web.example." is not a host name`,
			"spec.tls.trust.system: may only be true; set caPem or caFile for other roots",
			`spec.tls.subjectAltNames[1]: "a" is there twice, first as item 0`,
			`spec.tls.subjectAltNames[2]: "b:443" is neither a DNS name, an IP address nor a URI`,
			`spec.tls.subjectAltNames[3]: "*.*" is neither a DNS name, an IP address nor a URI`,
			`spec.tls.clientCertificate: "A" is not a name; use lower-case letters, digits, - and ., starting and ending with a letter or digit`,
			`spec.tls.policy: "b/c" is not a name; use lower-case letters, digits, - and ., starting and ending with a letter or digit`,
		}},
		{ok + "tls: {serverName: Web.example, trust: {caFile: ca.pem}}", []string{
			`spec.tls.serverName: "Web.example" must be lower case: "web.example"`,
			`spec.tls.trust.caFile: "ca.pem" is not an absolute path`,
		}},
		{ok + "protocol: http2\ntls: {renegotiation: once}", []string{
			"spec.tls.renegotiation: once needs HTTP/1.1; HTTP/2 forbids renegotiation (RFC 9113 section 9.2.1), so set protocol to http1 or tcp",
		}},
		{ok + "tls: {subjectCommonName: true, subjectAltNames: [a]}", []string{
			"spec.tls.subjectCommonName: has no use with subjectAltNames, which replace the check against the server name; remove one of them",
		}},
		{ok + "tls: {trust: {caPem: no pem}}", []string{"spec.tls.trust.caPem: holds no PEM block CERTIFICATE"}},
		{ok + "loadBalancing: {hashOn: ip}", []string{`spec.loadBalancing.hashOn: "ip" is not known; it is one of source_ip, host, path, header:NAME or cookie:NAME`}},
		{ok + "loadBalancing: {hashOn: 'header:'}", []string{`spec.loadBalancing.hashOn: "" is not the name of a header`}},
		{ok + "loadBalancing: {hashOn: 'cookie:a b'}", []string{`spec.loadBalancing.hashOn: "a b" is not the name of a cookie`}},
		{ok + "protocol: tcp\nloadBalancing: {hashOn: path}\nretries: {on: [503, stale_connection]}", []string{
			`spec.loadBalancing.hashOn: "path" needs HTTP; a pool with protocol tcp only has source_ip`,
			"spec.retries.on[0]: 503 needs HTTP; a pool with protocol tcp has no statuses",
		}},
		{ok + "healthCheck: {path: 'a?b', method: get, expectedStatuses: [100, 200, 200], interval: 50ms, timeout: 0s}", []string{
			"spec.healthCheck.timeout: must be above 0; leave it out for the default",
			`spec.healthCheck.path: "a?b" does not start with /`,
			`spec.healthCheck.method: "get" is neither GET nor HEAD`,
			"spec.healthCheck.expectedStatuses[0]: 100 is not the status of an answer; it must be 200 to 599",
			"spec.healthCheck.expectedStatuses[2]: 200 is there twice",
			"spec.healthCheck.serverName: is missing; a health check has no request whose host it could take, so set it or tls.serverName",
			"spec.healthCheck.interval: 50ms is below the minimum, 100ms",
		}},
		{ok + "connections: {maxPerFleet: 1}", nil},
		{ok + "connections: {maxPerFleet: 0}", []string{
			"spec.connections.maxPerFleet: must be at least 1; leave it out for no limit over all edges",
		}},
		{ok + "outlierDetection: {maxEjectionPercent: 101, statuses: [302, 503, 503]}\nretries: {attempts: 6, on: [502, 502]}\ntimeouts: {connect: 100000h}", []string{
			"spec.timeouts.connect: 100000h is above the maximum, 87600h",
			"spec.outlierDetection.maxEjectionPercent: 101 is above the maximum, 100",
			"spec.outlierDetection.statuses[0]: 302 is not the status of an answer; it must be 400 to 599",
			"spec.outlierDetection.statuses[2]: 503 is there twice",
			"spec.retries.attempts: 6 is above the maximum, 5",
			"spec.retries.on[1]: 502 is there twice",
		}},
	} {
		if diff := cmp.Diff(test.want, violationsOf(t, "BackendPool", test.spec)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.spec, diff)
		}
	}
}

func TestValidateBoundsEndpoints(t *testing.T) {
	pool := &resealv1.BackendPool{}
	for i := range 1001 {
		pool.Endpoints = append(pool.Endpoints, &resealv1.Endpoint{Address: fmt.Sprintf("h%d:443", i)})
	}
	want := []string{"spec.endpoints: holds 1001 endpoints; at most 1000 are allowed"}
	if diff := cmp.Diff(want, describe(Validate(poolOf("p", pool)))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, endpoint := range pool.Endpoints {
		endpoint.Address = "none"
	}
	pool.Endpoints = pool.Endpoints[:1000]
	if got := len(Validate(poolOf("p", pool))); got != 100 {
		t.Errorf("%d violations, want 100", got)
	}
}

func TestValidateTLSPolicy(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	for _, test := range []struct {
		spec string
		want []string
	}{
		{"minVersion: tls1.3\nmaxVersion: tls1.2", []string{"spec.minVersion: minVersion tls1.3 is above maxVersion tls1.2"}},
		{"cipherSuites: [TLS_AES_128_GCM_SHA256, TLS_RSA_WITH_RC4_128_SHA, TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA25, x, TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384]", []string{
			"spec.cipherSuites[0]: TLS_AES_128_GCM_SHA256 belongs to TLS 1.3, whose suites can't be chosen; remove it",
			"spec.cipherSuites[1]: TLS_RSA_WITH_RC4_128_SHA is insecure; choose another",
			`spec.cipherSuites[2]: "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA25" is not a cipher suite that Go knows; did you mean "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"?`,
			`spec.cipherSuites[3]: "x" is not a cipher suite that Go knows`,
			`spec.cipherSuites[5]: "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384" is there twice, first as item 4`,
		}},
		{"curves: [x25519, secp256k1]", []string{
			`spec.curves[0]: "x25519" is not known; did you mean "X25519"?`,
			`spec.curves[1]: "secp256k1" is not known; it is one of X25519, P256, P384, P521 or X25519MLKEM768`,
		}},
		{"alpn: ['']", []string{"spec.alpn[0]: must be 1 to 255 bytes long"}},
		{"resumption: {ticketLifetime: 169h, keyring: A}", []string{
			"spec.resumption.ticketLifetime: 169h is above the maximum, 168h (RFC 8446 section 4.6.1)",
			`spec.resumption.keyring: "A" is not a name; use lower-case letters, digits, - and ., starting and ending with a letter or digit`,
		}},
		{"clientAuth: {mode: optional}", []string{"spec.clientAuth.caPem: is missing; mode optional needs the roots of client certificates"}},
		{"clientAuth: {crlPem: x}", []string{"spec.clientAuth.caPem: is missing; crlPem holds revocation lists of these roots"}},
		{"clientAuth:\n  " + strings.ReplaceAll(yamlPEM("caPem", ca.certPEM)+yamlPEM("crlPem", other.revocationList), "\n", "\n  "),
			[]string{"spec.clientAuth.crlPem: revocation list 1 is not signed by a certificate of caPem"}},
		{"clientAuth:\n  " + strings.ReplaceAll(yamlPEM("caPem", ca.certPEM)+yamlPEM("crlPem", pemText("X509 CRL", []byte("x"))), "\n", "\n  "),
			[]string{"spec.clientAuth.crlPem: revocation list 1 can't be read: x509: malformed crl"}},
		{"clientAuth:\n  " + strings.ReplaceAll(yamlPEM("caPem", pemText("CERTIFICATE", []byte("x"))), "\n", "\n  "),
			[]string{"spec.clientAuth.caPem: certificate 1 can't be read: x509: malformed certificate"}},
	} {
		if diff := cmp.Diff(test.want, violationsOf(t, "TLSPolicy", test.spec)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.spec, diff)
		}
	}
}

func TestValidateListener(t *testing.T) {
	for _, test := range []struct {
		spec string
		want []string
	}{
		{"{}", []string{
			"spec.address: is missing; it must be host:port",
			"spec.certificates: is empty; name at least one Certificate",
		}},
		{"address: '443'\ncertificates: [c, c]\nproxyProtocol: {}\nforwarded: {trustedCIDRs: [10.0.0.1, 10.0.0.1/8, all]}\nedgeSelector: {matchLabels: {'a b': c, d: 'e f', 'X/y': z}}", []string{
			`spec.address: "443" has no port`,
			`spec.certificates[1]: "c" is there twice, first as item 0`,
			`spec.edgeSelector.matchLabels["X/y"]: the key's prefix "X" is not a DNS name`,
			`spec.edgeSelector.matchLabels["a b"]: "a b" is not a key; use at most 63 letters, digits, -, _ and ., starting and ending with a letter or digit`,
			`spec.edgeSelector.matchLabels["d"]: "e f" is not a label value; use at most 63 letters, digits, -, _ and ., starting and ending with a letter or digit`,
			"spec.proxyProtocol.trustedCIDRs: is empty; name the peers that send the PROXY header",
			`spec.forwarded.trustedCIDRs[0]: "10.0.0.1" has no prefix length; write 10.0.0.1/32`,
			`spec.forwarded.trustedCIDRs[1]: "10.0.0.1/8" has bits set beyond its prefix; write 10.0.0.0/8`,
			`spec.forwarded.trustedCIDRs[2]: "all" is not a CIDR such as 10.0.0.0/8`,
		}},
		{"address: ':1'\ncertificates: [c]\nprotocol: tls\nforwarded: {}\nclientCertificate: {}", []string{
			"spec.pool: is missing; a listener with protocol tls has no routes, so name its pool",
			"spec.forwarded: needs HTTP; remove it from a listener with protocol tls",
			"spec.clientCertificate: needs HTTP; remove it from a listener with protocol tls",
		}},
		{"address: ':1'\ncertificates: [c]\nforwarded: {removeHeaders: ['', 'a b', '*', 'X*', 'X-*-*', host, Content_Length, Transfer-*, X-A, x_a]}", []string{
			`spec.forwarded.removeHeaders[0]: "" is neither a header name nor the start of one with a * after it, such as X-Auth-*`,
			`spec.forwarded.removeHeaders[1]: "a b" is neither a header name nor the start of one with a * after it, such as X-Auth-*`,
			`spec.forwarded.removeHeaders[2]: "*" is neither a header name nor the start of one with a * after it, such as X-Auth-*`,
			`spec.forwarded.removeHeaders[3]: "X*": a * must follow a -, as in X-Auth-*`,
			`spec.forwarded.removeHeaders[4]: "X-*-*" is neither a header name nor the start of one with a * after it, such as X-Auth-*`,
			`spec.forwarded.removeHeaders[5]: "host" frames or routes the message; it can't be removed`,
			`spec.forwarded.removeHeaders[6]: "Content_Length" frames or routes the message; it can't be removed`,
			`spec.forwarded.removeHeaders[7]: "Transfer-*" matches Transfer-Encoding, which frames or routes the message; it can't be removed`,
			`spec.forwarded.removeHeaders[9]: "x_a" is there twice; case, and _ for -, make no difference`,
		}},
		{"address: ':1'\ncertificates: [c]\nclientCertificate: {forward: xfcc}\nforwarded: {removeHeaders: [X-Real-IP], keepHeaders: [X-User, X-*, Client-Cert, client_cert_chain, x-forwarded-client-cert, x_real_ip]}", []string{
			`spec.forwarded.keepHeaders[0]: "X-User" is not removed by default; what can be kept are Forwarded, X-Forwarded-*, X-Real-IP and X-SSL-Client-*, or headers of these names`,
			`spec.forwarded.keepHeaders[1]: "X-*" is not removed by default; what can be kept are Forwarded, X-Forwarded-*, X-Real-IP and X-SSL-Client-*, or headers of these names`,
			`spec.forwarded.keepHeaders[2]: "Client-Cert" can't be kept: only the server that made the handshake may set it (RFC 9440 section 4)`,
			`spec.forwarded.keepHeaders[3]: "client_cert_chain" can't be kept: only the server that made the handshake may set it (RFC 9440 section 4)`,
			`spec.forwarded.keepHeaders[4]: "x-forwarded-client-cert" is written by the edge, as clientCertificate.forward is xfcc; it can't be kept`,
			`spec.forwarded.keepHeaders[5]: "x_real_ip" is in removeHeaders, too; remove it from one of them`,
		}},
		{"address: ':1'\ncertificates: [c]\nforwarded: {removeHeaders: [" + strings.Repeat("a, ", 64) + "b]}", []string{
			"spec.forwarded.removeHeaders: holds 65 entries; at most 64 are allowed",
		}},
	} {
		if diff := cmp.Diff(test.want, violationsOf(t, "Listener", test.spec)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.spec, diff)
		}
	}
}

func TestValidateRoute(t *testing.T) {
	const ok = "listeners: [l]\npools: [{name: p}]\n"
	for _, test := range []struct {
		spec string
		want []string
	}{
		{"{}", []string{
			"spec.listeners: is empty; name at least one Listener",
			"spec.pools: is empty; name at least one BackendPool",
		}},
		{ok + "hosts: ['*', 'a:443', 'A.example', 'a.*.b', '*.', a, a]", []string{
			`spec.hosts[0]: "*" is not needed; leave hosts out to match any host`,
			`spec.hosts[1]: "a:443" has a port; write the host alone`,
			`spec.hosts[2]: "A.example" must be lower case: "a.example"`,
			`spec.hosts[3]: "a.*.b" is neither a host name nor "*." with a suffix`,
			`spec.hosts[4]: "*." is neither a host name nor "*." with a suffix`,
			`spec.hosts[6]: "a" is there twice, first as item 5`,
		}},
		{ok + "paths: [{}, {prefix: a}, {exact: '/a b'}, {exact: '/%zz'}, {prefix: '/a#b'}, {exact: /x}, {exact: /x}]", []string{
			"spec.paths[0]: has neither prefix nor exact; set one of them",
			`spec.paths[1].prefix: "a" does not start with /`,
			`spec.paths[2].exact: "/a b" holds a character that must be percent-encoded`,
			`spec.paths[3].exact: "/%zz" is not a path`,
			`spec.paths[4].prefix: "/a#b" holds a query or fragment; write the path alone`,
			`spec.paths[6]: exact "/x" is there twice`,
		}},
		{"listeners: [l, l]\npools: [{name: p, weight: 0}, {name: p, weight: 0}, {weight: 0}]", []string{
			`spec.listeners[1]: "l" is there twice, first as item 0`,
			`spec.pools[1].name: "p" is there twice; give it more weight instead`,
			"spec.pools[2].name: is empty; it must be a name",
			"spec.pools: every weight is 0, so no pool gets requests",
		}},
		{"listeners: [l]\npools: [{name: p, weight: 1000001}]", []string{"spec.pools[0].weight: 1000001 is above the maximum, 1000000"}},
		{ok + "requestHeaders: {set: {'a b': c, X-A: \"d\\ne\", x-a: f, host: g/h}, remove: [connection, '']}\nresponseHeaders: {add: {Transfer-Encoding: x}}", []string{
			`spec.requestHeaders.set["X-A"]: is not a header value (RFC 9110 section 5.5): it holds control characters`,
			`spec.requestHeaders.set["a b"]: "a b" is not a header name (RFC 9110 section 5.1)`,
			`spec.requestHeaders.set["host"]: "g/h" is not a host with or without a port, for example backend.example:8443`,
			`spec.requestHeaders.set["x-a"]: is the same header as "X-A"`,
			`spec.requestHeaders.remove[0]: the edge sets "connection" itself; it can't be edited`,
			`spec.requestHeaders.remove[1]: "" is not a header name (RFC 9110 section 5.1)`,
			`spec.responseHeaders.add["Transfer-Encoding"]: the edge sets "Transfer-Encoding" itself; it can't be edited`,
		}},
		{ok + "timeouts: {request: 0s}", []string{"spec.timeouts.request: must be above 0; leave it out for the default"}},
	} {
		if diff := cmp.Diff(test.want, violationsOf(t, "Route", test.spec)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.spec, diff)
		}
	}
}

func TestValidateCertificate(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	chain := yamlPEM("certificatePem", ca.certPEM)
	damaged := strings.Replace(ca.certPEM, "-----END", "*----END", 1)
	for name, test := range map[string]struct{ spec, want string }{
		"nothing":           {"{}", "spec: has no certificate; set certificatePem and privateKeyPem, or certificateFile and privateKeyFile"},
		"both":              {chain + "certificateFile: /a\nprivateKeyFile: /b", "spec.certificateFile: PEM and files are both set; remove one of them"},
		"PEM and key file":  {chain + "privateKeyFile: /b", "spec.privateKeyFile: PEM and files are both set; remove one of them"},
		"key alone":         {yamlPEM("privateKeyPem", ca.pkcs8), "spec.certificatePem: is missing; a private key needs its certificate"},
		"no key file":       {"certificateFile: /a", "spec.privateKeyFile: is missing; certificateFile needs it"},
		"no file":           {"privateKeyFile: /a", "spec.certificateFile: is missing; privateKeyFile needs it"},
		"relative":          {"certificateFile: a\nprivateKeyFile: /b", `spec.certificateFile: "a" is not an absolute path`},
		"marker":            {chain + "privateKeyPem: <redacted>", "spec.privateKeyPem: is the mark of a value that is not shown; leave the field out to keep the stored value"},
		"marker with break": {chain + "privateKeyPem: |\n  <redacted>\n", "spec.privateKeyPem: is the mark of a value that is not shown; leave the field out to keep the stored value"},
		"other key":         {chain + yamlPEM("privateKeyPem", other.pkcs8), "spec.privateKeyPem: does not belong to the first certificate of certificatePem"},
		"no key":            {chain + "privateKeyPem: abc", "spec.privateKeyPem: holds no PEM block PRIVATE KEY"},
		"certificate key":   {chain + yamlPEM("privateKeyPem", ca.certPEM), "spec.privateKeyPem: is not a private key; it holds another kind of PEM block"},
		"damaged key":       {chain + yamlPEM("privateKeyPem", pemText("PRIVATE KEY", []byte("x"))), "spec.privateKeyPem: can't be read; it must be a PKCS #8, PKCS #1 or SEC 1 private key"},
		"encrypted key":     {chain + yamlPEM("privateKeyPem", pemText("ENCRYPTED PRIVATE KEY", []byte("x"))), "spec.privateKeyPem: is encrypted with a password; decrypt it first"},
		"key in chain":      {yamlPEM("certificatePem", ca.certPEM+ca.pkcs8), `spec.certificatePem: holds a PEM block "PRIVATE KEY" where only CERTIFICATE belongs`},
		"damaged":           {yamlPEM("certificatePem", damaged+ca.certPEM), "spec.certificatePem: holds a damaged PEM block"},
	} {
		if diff := cmp.Diff([]string{test.want}, violationsOf(t, "Certificate", test.spec)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestValidateKeyring(t *testing.T) {
	for spec, want := range map[string]string{
		"rotationInterval: 59s":                   "spec.rotationInterval: 59s is below the minimum, 1m",
		"rotationInterval: 25h":                   "spec.rotationInterval: maxActiveAge 24h is below rotationInterval 25h: edges would stop issuing tickets before the next epoch",
		"maxActiveAge: 30m":                       "spec.maxActiveAge: maxActiveAge 30m is below rotationInterval 1h: edges would stop issuing tickets before the next epoch",
		"edgeSelector: {matchLabels: {a: '*'}}":   `spec.edgeSelector.matchLabels["a"]: "*" is not a label value; use at most 63 letters, digits, -, _ and ., starting and ending with a letter or digit`,
		"rotationInterval: 0s\nmaxActiveAge: 24h": "spec.rotationInterval: must be above 0; leave it out for the default",
	} {
		if diff := cmp.Diff([]string{want}, violationsOf(t, "Keyring", spec)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", spec, diff)
		}
	}
}

func TestValidateMetadata(t *testing.T) {
	many := make(map[string]string)
	for i := range 65 {
		many[fmt.Sprintf("k%d", i)] = ""
	}
	long := strings.Repeat("a", 64)
	for name, test := range map[string]struct {
		metadata *resealv1.Metadata
		want     string
	}{
		"none":             {nil, "metadata.name: is missing; name the resource"},
		"upper case":       {&resealv1.Metadata{Name: "A"}, `metadata.name: "A" is not a name; use lower-case letters, digits, - and ., starting and ending with a letter or digit`},
		"long":             {&resealv1.Metadata{Name: strings.Repeat("a.", 127)}, "metadata.name: is 254 bytes long; a name has at most 253"},
		"several lines":    {&resealv1.Metadata{Name: "a\nb"}, "metadata.name: the value is not a name; use lower-case letters, digits, - and ., starting and ending with a letter or digit"},
		"long label":       {&resealv1.Metadata{Name: "a", Labels: map[string]string{"a": long}}, `metadata.labels["a"]: "` + long + `" is not a label value; use at most 63 letters, digits, -, _ and ., starting and ending with a letter or digit`},
		"many labels":      {&resealv1.Metadata{Name: "a", Labels: many}, "metadata.labels: holds 65 entries; at most 64 are allowed"},
		"many annotations": {&resealv1.Metadata{Name: "a", Annotations: many}, "metadata.annotations: holds 65 entries; at most 64 are allowed"},
		"large annotation": {&resealv1.Metadata{Name: "a", Annotations: map[string]string{"a": strings.Repeat("x", 16384)}}, "metadata.annotations: holds 16385 bytes; at most 16384 are allowed"},
	} {
		r := resealv1.NewResource("Keyring")
		r.Metadata = test.metadata
		if diff := cmp.Diff([]string{test.want}, describe(Validate(r))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// What comes over the wire can hold more than a manifest.
func TestValidateWire(t *testing.T) {
	want := []string{": has no spec; its kind is one of BackendPool, TLSPolicy, Listener, Route, Certificate, Keyring or RolloutPolicy"}
	for _, r := range []*resealv1.Resource{nil, {}, {Metadata: &resealv1.Metadata{Name: "a"}}} {
		if diff := cmp.Diff(want, describe(Validate(r))); diff != "" {
			t.Errorf("no spec (-want +got):\n%s", diff)
		}
	}
	pool := &resealv1.BackendPool{
		Endpoints:   []*resealv1.Endpoint{{Address: "a:1"}},
		Protocol:    77,
		Retries:     &resealv1.Retries{On: []resealv1.Retries_Condition{0}},
		Connections: &resealv1.Connections{IdleTimeout: durationpb.New(-time.Second), MaxLifetime: &durationpb.Duration{Seconds: 1, Nanos: -1}},
	}
	pool.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 999, protowire.VarintType), 1))
	want = []string{
		"spec: holds a field that this version does not know",
		"spec.protocol: 77 is not known; it is one of auto, http1, http2 or tcp",
		"spec.connections.idleTimeout: -1s is negative",
		"spec.connections.maxLifetime: is not a valid duration",
		"spec.retries.on[0]: 0 is not known; it is one of connect_failure, stale_connection, 502, 503 or 504",
	}
	if diff := cmp.Diff(want, describe(Validate(poolOf("p", pool)))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
