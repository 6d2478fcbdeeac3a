package frontend

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
)

// setForwarded tells the backend about the client, in Forwarded (RFC 7239) and
// in the X-Forwarded-* that are in use beside it. Claims of the client are gone:
// what is there is of one that is believed, and is kept and extended.
func setForwarded(fields *exchange.Fields, source netip.AddrPort, host string, port uint16) {
	client := source.Addr().Unmap().WithZone("").String()
	appendList(fields, "X-Forwarded-For", client)
	appendList(fields, "Forwarded", forwardedElement(source.Addr(), client, host))
	setAbsent(fields, "X-Forwarded-Proto", "https")
	setAbsent(fields, "X-Forwarded-Host", host)
	setAbsent(fields, "X-Forwarded-Port", strconv.Itoa(int(port)))
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
	if value != "" && fields.Get(name) == "" {
		fields.Set(name, value)
	}
}

// forwardedElement is our hop. IPv6 addresses and hosts with a port are not
// tokens and need quotes (RFC 7239 section 4).
func forwardedElement(client netip.Addr, node, host string) string {
	if client.Unmap().Is6() {
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
