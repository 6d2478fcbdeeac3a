package rules

import (
	"fmt"
	"slices"
	"strings"
	"time"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	maxEndpoints      = 1000
	maxEndpointWeight = 1000
	maxRetryAttempts  = 5
)

func (c *checker) backendPool(p *resealv1.BackendPool) {
	switch {
	case len(p.Endpoints) == 0 && p.Dns == nil:
		c.failf("spec", "has neither endpoints nor dns; set one of them")
	case len(p.Endpoints) > 0 && p.Dns != nil:
		c.failf("spec.dns", "endpoints and dns are both set; remove one of them")
	}
	c.endpoints(p.Endpoints)
	if p.Dns != nil {
		c.dns(p.Dns)
	}
	c.backendTLS(p)
	c.loadBalancing(p)
	if limit := p.GetConnections(); limit != nil && limit.MaxPerFleet != nil && *limit.MaxPerFleet == 0 {
		c.failf("spec.connections.maxPerFleet", "must be at least 1; leave it out for no limit over all edges")
	}
	if p.HealthCheck != nil {
		c.healthCheck(p)
	}
	if p.OutlierDetection != nil {
		c.atMost("spec.outlierDetection.maxEjectionPercent", p.OutlierDetection.GetMaxEjectionPercent(), 100)
		c.statuses("spec.outlierDetection.statuses", p.OutlierDetection.Statuses, 400)
	}
	c.retries(p)
}

func (c *checker) endpoints(endpoints []*resealv1.Endpoint) {
	if len(endpoints) > maxEndpoints {
		c.failf("spec.endpoints", "holds %d endpoints; at most %d are allowed", len(endpoints), maxEndpoints)
		return
	}
	first := make(map[string]int, len(endpoints))
	for i, endpoint := range endpoints {
		path := ItemPath("spec.endpoints", i)
		c.atMost(path+".weight", endpoint.GetWeight(), maxEndpointWeight)
		if err := checkHostPort(endpoint.GetAddress(), false); err != nil {
			c.err(path+".address", err)
			continue
		}
		key := strings.ToLower(endpoint.GetAddress())
		if earlier, ok := first[key]; ok {
			c.failf(path+".address", "%s is there twice, first as endpoint %d; give one endpoint more weight instead", Quote(endpoint.GetAddress()), earlier)
			continue
		}
		first[key] = i
	}
}

func (c *checker) dns(dns *resealv1.DNSEndpoints) {
	// A trailing dot keeps a resolver from its search domains.
	c.err("spec.dns.name", checkHostName(strings.TrimSuffix(dns.Name, ".")))
	if dns.Port < 1 || dns.Port > 65535 {
		c.failf("spec.dns.port", "%d is not a port; it must be 1 to 65535", dns.Port)
	}
	c.atLeast("spec.dns.refreshInterval", dns.RefreshInterval, time.Second)
}

func (c *checker) backendTLS(p *resealv1.BackendPool) {
	tls := p.GetTls()
	c.optional("spec.tls.serverName", tls.GetServerName(), checkServerName)
	switch roots := tls.GetTrust().GetRoots().(type) {
	case *resealv1.BackendTLS_Trust_CaPem:
		_, err := parseCertificates(roots.CaPem)
		c.err("spec.tls.trust.caPem", err)
	case *resealv1.BackendTLS_Trust_CaFile:
		c.err("spec.tls.trust.caFile", checkFile(roots.CaFile))
	case *resealv1.BackendTLS_Trust_System:
		if !roots.System {
			c.failf("spec.tls.trust.system", "may only be true; set caPem or caFile for other roots")
		}
	}
	c.each("spec.tls.subjectAltNames", tls.GetSubjectAltNames(), checkAltName)
	c.optional("spec.tls.clientCertificate", tls.GetClientCertificate(), checkName)
	c.optional("spec.tls.policy", tls.GetPolicy(), checkName)
	if tls.GetRenegotiation() == resealv1.BackendTLS_RENEGOTIATION_ONCE && p.Protocol == resealv1.BackendPool_PROTOCOL_HTTP2 {
		c.failf("spec.tls.renegotiation", "once needs HTTP/1.1; HTTP/2 forbids renegotiation (RFC 9113 section 9.2.1), so set protocol to http1 or tcp")
	}
	if tls.GetSubjectCommonName() && len(tls.GetSubjectAltNames()) > 0 {
		c.failf("spec.tls.subjectCommonName", "has no use with subjectAltNames, which replace the check against the server name; remove one of them")
	}
}

func (c *checker) loadBalancing(p *resealv1.BackendPool) {
	hashOn := p.GetLoadBalancing().GetHashOn()
	source, name, named := strings.Cut(hashOn, ":")
	switch {
	case hashOn == "" || hashOn == "source_ip":
	case p.Protocol == resealv1.BackendPool_PROTOCOL_TCP:
		c.failf("spec.loadBalancing.hashOn", "%s needs HTTP; a pool with protocol tcp only has source_ip", Quote(hashOn))
	case hashOn == "host" || hashOn == "path":
	case named && (source == "header" || source == "cookie"):
		// A cookie's name is a token as well (RFC 6265 section 4.1.1).
		if checkHeaderName(name) != nil {
			c.failf("spec.loadBalancing.hashOn", "%s is not the name of a %s", Quote(name), source)
		}
	default:
		known := []string{"source_ip", "host", "path", "header:NAME", "cookie:NAME"}
		c.failf("spec.loadBalancing.hashOn", "%s is not known; it is one of %s", Quote(hashOn), OneOf(known))
	}
}

func (c *checker) healthCheck(p *resealv1.BackendPool) {
	check := p.HealthCheck
	c.optional("spec.healthCheck.path", check.Path, checkPath)
	if check.Method != "" && check.Method != "GET" && check.Method != "HEAD" {
		c.failf("spec.healthCheck.method", "%s is neither GET nor HEAD", Quote(check.Method))
	}
	c.statuses("spec.healthCheck.expectedStatuses", check.ExpectedStatuses, 200)
	if check.ServerName == "" && p.GetTls().GetServerName() == "" {
		c.failf("spec.healthCheck.serverName", "is missing; a health check has no request whose host it could take, so set it or tls.serverName")
	}
	c.optional("spec.healthCheck.serverName", check.ServerName, checkServerName)
	c.atLeast("spec.healthCheck.interval", check.Interval, 100*time.Millisecond)
}

// statuses are those of answers, each once, from least to 599.
func (c *checker) statuses(path string, statuses []uint32, least uint32) {
	seen := make(map[uint32]bool, len(statuses))
	for i, status := range statuses {
		switch {
		case status < least || status > 599:
			c.failf(ItemPath(path, i), "%d is not the status of an answer; it must be %d to 599", status, least)
		case seen[status]:
			c.failf(ItemPath(path, i), "%d is there twice", status)
		}
		seen[status] = true
	}
}

func (c *checker) retries(p *resealv1.BackendPool) {
	c.atMost("spec.retries.attempts", p.GetRetries().GetAttempts(), maxRetryAttempts)
	onStatus := []resealv1.Retries_Condition{
		resealv1.Retries_CONDITION_502, resealv1.Retries_CONDITION_503, resealv1.Retries_CONDITION_504,
	}
	on := p.GetRetries().GetOn()
	for i, condition := range on {
		path := ItemPath("spec.retries.on", i)
		switch {
		case slices.Contains(on[:i], condition):
			c.failf(path, "%s is there twice", resealv1.Label(condition))
		case p.Protocol == resealv1.BackendPool_PROTOCOL_TCP && slices.Contains(onStatus, condition):
			c.err(path, fmt.Errorf("%s needs HTTP; a pool with protocol tcp has no statuses", resealv1.Label(condition)))
		}
	}
}
