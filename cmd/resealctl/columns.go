package main

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// column is one column of a kind's table.
type column struct {
	header string
	wide   bool // only with -o wide
	cell   func(r *resealv1.Resource) string
}

// columnsOf are the columns of a kind. Cells show defaults filled in, since that
// is what edges do.
func columnsOf(kind string, wide bool) []column {
	columns := []column{{header: "NAME", cell: func(r *resealv1.Resource) string { return r.GetMetadata().GetName() }}}
	columns = append(columns, kindColumns[kind]...)
	columns = append(columns,
		column{header: "AGE", cell: func(r *resealv1.Resource) string { return age(r.GetMetadata().GetCreatedAt()) }},
		column{header: "REVISION", wide: true, cell: func(r *resealv1.Resource) string { return fmt.Sprint(r.GetMetadata().GetRevision()) }},
		column{header: "LABELS", wide: true, cell: func(r *resealv1.Resource) string { return joinLabels(r.GetMetadata().GetLabels()) }},
	)
	return slices.DeleteFunc(columns, func(c column) bool { return c.wide && !wide })
}

var kindColumns = map[string][]column{
	"BackendPool": {
		poolColumn("ENDPOINTS", false, poolEndpoints),
		poolColumn("PROTOCOL", false, func(p *resealv1.BackendPool) string { return resealv1.Label(p.GetProtocol()) }),
		poolColumn("SNI", false, poolServerName),
		poolColumn("SESSIONS", false, poolSessions),
		poolColumn("REUSE", true, func(p *resealv1.BackendPool) string { return resealv1.Label(p.GetConnections().GetReuse()) }),
		poolColumn("BALANCING", true, func(p *resealv1.BackendPool) string {
			return resealv1.Label(p.GetLoadBalancing().GetAlgorithm())
		}),
		poolColumn("HEALTHCHECK", true, poolHealthCheck),
	},
	"Listener": {
		listenerColumn("ADDRESS", false, (*resealv1.Listener).GetAddress),
		listenerColumn("PROTOCOL", false, func(l *resealv1.Listener) string { return resealv1.Label(l.GetProtocol()) }),
		listenerColumn("CERTIFICATES", false, func(l *resealv1.Listener) string { return joinSome(l.GetCertificates(), 2) }),
		listenerColumn("POOL", false, func(l *resealv1.Listener) string { return orNone(l.GetPool()) }),
		listenerColumn("SELECTOR", false, func(l *resealv1.Listener) string { return selector(l.GetEdgeSelector()) }),
		listenerColumn("TLSPOLICY", true, func(l *resealv1.Listener) string { return orNone(l.GetTlsPolicy()) }),
	},
	"Route": {
		routeColumn("LISTENERS", func(r *resealv1.Route) string { return joinSome(r.GetListeners(), 3) }),
		routeColumn("HOSTS", func(r *resealv1.Route) string { return orAny(joinSome(r.GetHosts(), 2)) }),
		routeColumn("PATHS", func(r *resealv1.Route) string { return orAny(joinSome(routePaths(r), 2)) }),
		routeColumn("POOLS", func(r *resealv1.Route) string { return joinSome(routePools(r), 3) }),
	},
	"Certificate": {
		certificateColumn("NAMES", false, certificateNames),
		certificateColumn("EXPIRES", false, certificateExpiry),
		certificateColumn("ISSUER", true, certificateIssuer),
	},
	"TLSPolicy": {
		policyColumn("MIN", false, func(p *resealv1.TLSPolicy) string { return resealv1.Label(p.GetMinVersion()) }),
		policyColumn("MAX", false, func(p *resealv1.TLSPolicy) string { return resealv1.Label(p.GetMaxVersion()) }),
		policyColumn("ALPN", false, func(p *resealv1.TLSPolicy) string { return orDefault(strings.Join(p.GetAlpn(), ",")) }),
		policyColumn("RESUMPTION", false, policyResumption),
		policyColumn("CLIENTAUTH", false, func(p *resealv1.TLSPolicy) string { return resealv1.Label(p.GetClientAuth().GetMode()) }),
		policyColumn("KEYRING", true, func(p *resealv1.TLSPolicy) string { return p.GetResumption().GetKeyring() }),
		policyColumn("CIPHERS", true, func(p *resealv1.TLSPolicy) string { return orDefault(strings.Join(p.GetCipherSuites(), ",")) }),
		policyColumn("CURVES", true, func(p *resealv1.TLSPolicy) string { return orDefault(strings.Join(p.GetCurves(), ",")) }),
	},
	"Keyring": {
		keyringColumn("ROTATION", func(k *resealv1.Keyring) string { return configured(k.GetRotationInterval()) }),
		keyringColumn("RETIREAFTER", func(k *resealv1.Keyring) string { return configured(k.GetRetireAfter()) }),
		keyringColumn("MAXACTIVEAGE", func(k *resealv1.Keyring) string { return configured(k.GetMaxActiveAge()) }),
		keyringColumn("SELECTOR", func(k *resealv1.Keyring) string { return selector(k.GetEdgeSelector()) }),
	},
	"RolloutPolicy": {
		{"STAGES", false, func(r *resealv1.Resource) string { return rolloutStages(r.GetRolloutPolicy().WithDefaults()) }},
		{"ONFAILURE", false, func(r *resealv1.Resource) string {
			return resealv1.Label(r.GetRolloutPolicy().WithDefaults().GetOnFailure())
		}},
	},
}

func poolColumn(header string, wide bool, cell func(*resealv1.BackendPool) string) column {
	return column{header, wide, func(r *resealv1.Resource) string { return cell(r.GetBackendPool().WithDefaults()) }}
}

func listenerColumn(header string, wide bool, cell func(*resealv1.Listener) string) column {
	return column{header, wide, func(r *resealv1.Resource) string { return cell(r.GetListener().WithDefaults()) }}
}

func routeColumn(header string, cell func(*resealv1.Route) string) column {
	return column{header, false, func(r *resealv1.Resource) string { return cell(r.GetRoute()) }}
}

func certificateColumn(header string, wide bool, cell func(*resealv1.Certificate) string) column {
	return column{header, wide, func(r *resealv1.Resource) string { return cell(r.GetCertificate()) }}
}

func policyColumn(header string, wide bool, cell func(*resealv1.TLSPolicy) string) column {
	return column{header, wide, func(r *resealv1.Resource) string { return cell(r.GetTlsPolicy().WithDefaults()) }}
}

// rolloutStages are the stages of a policy: "1 edge, 10%, site=a".
func rolloutStages(p *resealv1.RolloutPolicy) string {
	var texts []string
	for _, stage := range p.GetStages() {
		switch {
		case stage.GetEdgeSelector() != nil:
			texts = append(texts, selector(stage.GetEdgeSelector()))
		case stage.GetEdges() > 0:
			texts = append(texts, plural(uint64(stage.GetEdges()), "edge"))
		default:
			texts = append(texts, fmt.Sprintf("%d%%", stage.GetPercent()))
		}
	}
	return joinSome(texts, 4)
}

func keyringColumn(header string, cell func(*resealv1.Keyring) string) column {
	return column{header, false, func(r *resealv1.Resource) string { return cell(r.GetKeyring().WithDefaults()) }}
}

func poolEndpoints(p *resealv1.BackendPool) string {
	if dns := p.GetDns(); dns != nil {
		return fmt.Sprintf("dns:%s:%d", dns.GetName(), dns.GetPort())
	}
	addresses := make([]string, len(p.GetEndpoints()))
	for i, endpoint := range p.GetEndpoints() {
		addresses[i] = endpoint.GetAddress()
	}
	return joinSome(addresses, 2)
}

func poolServerName(p *resealv1.BackendPool) string {
	if name := p.GetTls().GetServerName(); name != "" {
		return name
	}
	return "<host>"
}

func poolSessions(p *resealv1.BackendPool) string {
	s := p.GetSessions()
	words := []string{resealv1.Label(s.GetMode())}
	if s.GetMode() != resealv1.Sessions_MODE_OFF {
		if s.GetScope() == resealv1.Sessions_SCOPE_POOL {
			words = append(words, "pool")
		}
		if s.GetSharing() == resealv1.Sessions_SHARING_FLEET {
			words = append(words, "fleet")
		}
	}
	return strings.Join(words, ",")
}

func poolHealthCheck(p *resealv1.BackendPool) string {
	check := p.GetHealthCheck()
	if check == nil {
		return "<none>"
	}
	return fmt.Sprintf("%s every %s", check.GetPath(), configured(check.GetInterval()))
}

func routePaths(r *resealv1.Route) []string {
	var paths []string
	for _, path := range r.GetPaths() {
		if prefix := path.GetPrefix(); prefix != "" {
			paths = append(paths, strings.TrimSuffix(prefix, "/")+"/*")
		} else {
			paths = append(paths, path.GetExact())
		}
	}
	return paths
}

func routePools(r *resealv1.Route) []string {
	var pools []string
	for _, pool := range r.GetPools() {
		text := pool.GetName()
		if pool.Weight != nil {
			text += fmt.Sprintf(":%d", pool.GetWeight())
		}
		pools = append(pools, text)
	}
	return pools
}

func policyResumption(p *resealv1.TLSPolicy) string {
	if !p.GetResumption().GetEnabled() {
		return "off"
	}
	return configured(p.GetResumption().GetTicketLifetime())
}

func selector(s *resealv1.EdgeSelector) string {
	if len(s.GetMatchLabels()) == 0 {
		return "<all>"
	}
	return joinLabels(s.GetMatchLabels())
}

func orAny(s string) string {
	if s == "<none>" {
		return "<any>"
	}
	return s
}

func orDefault(s string) string {
	if s == "" {
		return "<default>"
	}
	return s
}

func certificateNames(c *resealv1.Certificate) string {
	if file := c.GetCertificateFile(); file != "" {
		return "file:" + file
	}
	leaf, err := leafOf(c)
	if err != nil {
		return "<unreadable>"
	}
	return joinSome(certNames(leaf), 2)
}

func certificateExpiry(c *resealv1.Certificate) string {
	leaf, err := leafOf(c)
	if err != nil {
		return "<unknown>"
	}
	return expiry(leaf.NotAfter)
}

func certificateIssuer(c *resealv1.Certificate) string {
	leaf, err := leafOf(c)
	if err != nil {
		return "<unknown>"
	}
	return orNone(leaf.Issuer.String())
}

// expiry is the time until an end, as tables show it.
func expiry(end time.Time) string {
	if left := time.Until(end); left > 0 {
		return "in " + shortDuration(left)
	}
	return "EXPIRED " + shortDuration(time.Since(end)) + " ago"
}

func leafOf(c *resealv1.Certificate) (*x509.Certificate, error) {
	certs, err := parseCertificates([]byte(c.GetCertificatePem()))
	if err != nil {
		return nil, err
	}
	return certs[0], nil
}

// certNames are the names that a certificate is valid for.
func certNames(cert *x509.Certificate) []string {
	names := slices.Clone(cert.DNSNames)
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	for _, uri := range cert.URIs {
		names = append(names, uri.String())
	}
	if len(names) == 0 && cert.Subject.CommonName != "" {
		names = append(names, "CN="+cert.Subject.CommonName)
	}
	return names
}

// parseCertificates reads the certificates of a PEM text, at least one.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("holds no PEM certificate")
	}
	return certs, nil
}
