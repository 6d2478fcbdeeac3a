package frontend

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

// forwarded is what backends are told about the client of a connection. It is
// written once, and the element of Forwarded once for each host that follows another.
type forwarded struct {
	client, port  string
	host, element string
}

func newForwarded(source netip.Addr, port uint16) *forwarded {
	return &forwarded{client: source.Unmap().WithZone("").String(), port: strconv.Itoa(int(port))}
}

// set tells the backend about the client, in Forwarded (RFC 7239) and in the
// X-Forwarded-* that are in use beside it. Claims of the client are gone: what is
// there is of one that is believed, and is kept and extended.
func (f *forwarded) set(fields *exchange.Fields, host string) {
	if host != f.host || f.element == "" {
		f.host, f.element = host, forwardedElement(f.client, host)
	}
	appendList(fields, "X-Forwarded-For", f.client)
	appendList(fields, "Forwarded", f.element)
	setAbsent(fields, "X-Forwarded-Proto", "https")
	setAbsent(fields, "X-Forwarded-Host", host)
	setAbsent(fields, "X-Forwarded-Port", f.port)
}

// appendList adds to a comma-separated list, on one line.
func appendList(fields *exchange.Fields, name, element string) {
	if !fields.Has(name) {
		fields.Add(name, element)
		return
	}
	var list []string
	for before := range fields.Values(name) {
		list = append(list, before)
	}
	fields.Set(name, strings.Join(append(list, element), ", "))
}

func setAbsent(fields *exchange.Fields, name, value string) {
	switch {
	case value == "":
	case !fields.Has(name):
		fields.Add(name, value)
	case fields.Get(name) == "":
		fields.Set(name, value)
	}
}

// forwardedElement is our hop. IPv6 addresses and hosts with a port are not
// tokens and need quotes (RFC 7239 section 4).
func forwardedElement(node, host string) string {
	if strings.Contains(node, ":") {
		node = `"[` + node + `]"`
	}
	if host == "" {
		return "for=" + node + ";proto=https"
	}
	return "for=" + node + ";host=" + quoted(host) + ";proto=https"
}

// quoted quotes what is not a token. host was checked: there is nothing to escape.
func quoted(host string) string {
	if strings.ContainsAny(host, ":[]") {
		return `"` + host + `"`
	}
	return host
}
