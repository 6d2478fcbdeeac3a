package frontend

import (
	"net/http"
	"net/netip"
	"strconv"
	"strings"
)

// setForwarded tells the backend about the client, in Forwarded (RFC 7239) and
// in the X-Forwarded-* that are in use beside it. Claims of the client are gone:
// what is there is of one that is believed, and is kept and extended.
func setForwarded(header http.Header, source netip.AddrPort, host string, port uint16) {
	client := source.Addr().Unmap().WithZone("").String()
	appendList(header, "X-Forwarded-For", client)
	appendList(header, "Forwarded", forwardedElement(source.Addr(), host))
	setAbsent(header, "X-Forwarded-Proto", "https")
	setAbsent(header, "X-Forwarded-Host", host)
	setAbsent(header, "X-Forwarded-Port", strconv.Itoa(int(port)))
}

// appendList adds to a comma-separated list, on one line.
func appendList(header http.Header, name, element string) {
	if before := header[name]; len(before) > 0 {
		element = strings.Join(before, ", ") + ", " + element
	}
	header[name] = []string{element}
}

func setAbsent(header http.Header, name, value string) {
	if header.Get(name) == "" && value != "" {
		header[name] = []string{value}
	}
}

// forwardedElement is our hop. IPv6 addresses and hosts with a port are not
// tokens and need quotes (RFC 7239 section 4).
func forwardedElement(client netip.Addr, host string) string {
	client = client.Unmap().WithZone("")
	node := client.String()
	if client.Is6() {
		node = `"[` + node + `]"`
	}
	element := "for=" + node
	if host != "" {
		element += ";host=" + quoted(host)
	}
	return element + ";proto=https"
}

// quoted quotes what is not a token. host was checked: there is nothing to escape.
func quoted(host string) string {
	if strings.ContainsAny(host, ":[]") {
		return `"` + host + `"`
	}
	return host
}
